//! Tasks of the brep workspace: `cargo xtask test`, `cargo xtask iotest`, `cargo xtask deps`.

mod backports;
mod deps;
mod guest;
mod iotest;
mod process;
mod programs;
mod skips;
mod test;
mod tidy;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about, disable_help_subcommand = true)]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Check and test the workspace, or only the named stages
    Test(test::Args),
    /// Run the numbered end-to-end tests against the real binary
    Iotest(iotest::Args),
    /// List the programs that the tests use, and install what is missing
    Deps(deps::Args),
}

fn main() -> ExitCode {
    let outcome = match Args::parse().task {
        Task::Test(args) => test::main(&args),
        Task::Iotest(args) => iotest::main(&args),
        Task::Deps(args) => deps::main(&args),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("cargo xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
