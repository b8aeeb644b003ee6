fn main() -> std::process::ExitCode {
    odmr::cli::main()
}
