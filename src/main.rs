//! The program; all of it stands in [`odmr::cli`].

fn main() -> std::process::ExitCode {
    odmr::cli::main()
}
