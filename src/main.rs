//! The program `odmr`; see [`odmr::cli`].

fn main() -> std::process::ExitCode {
    odmr::cli::main()
}
