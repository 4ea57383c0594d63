//! Tasks of the brep workspace: `cargo xtask test`, `iotest`, `simulate`, `fuzz`, `bench`, `deps`.

mod backports;
mod bench;
mod deps;
mod fuzz;
mod guest;
mod iotest;
mod process;
mod programs;
mod python_packages;
mod simulate;
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
    /// Live through histories of a pair over simulated disks, links and time
    Simulate(simulate::Args),
    /// Look for bytes that break what strangers talk to
    Fuzz(fuzz::Args),
    /// Compare speeds with a pair of QEMUs, qemu-nbd and nbdkit
    Bench(bench::Args),
    /// Read or write at random over NBD: a load of the bench
    #[command(hide = true)]
    NbdLoad(bench::nbd_load::Args),
    /// List the programs that the tests use, and install what is missing
    Deps(deps::Args),
}

fn main() -> ExitCode {
    let outcome = match Args::parse().task {
        Task::Test(args) => test::main(&args),
        Task::Iotest(args) => iotest::main(&args),
        Task::Simulate(args) => simulate::main(&args),
        Task::Fuzz(args) => fuzz::main(&args),
        Task::Bench(args) => bench::main(&args),
        Task::NbdLoad(args) => bench::nbd_load::main(&args),
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
