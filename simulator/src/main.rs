#![doc = include_str!("../README.md")]
mod campaign;
mod disk;
mod ending;
mod file;
mod files;
mod guest;
mod history;
mod model;
mod names;
mod network;
mod parts;
#[cfg(test)]
mod power_points;
mod rng;
mod side;
mod watch;
mod world;

use std::process::ExitCode;

use brep_block::plant::Plant;
use clap::Parser;

/// Runs histories of a replicated pair over simulated disks, links and time.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask simulate")]
struct Args {
    /// The first history; with it alone, only that one, event by event
    #[arg(long)]
    seed: Option<u64>,
    /// How many histories, from the seed on
    #[arg(long)]
    runs: Option<u64>,
    /// Threads
    #[arg(long, default_value_t = 2)]
    jobs: u64,
    /// A bug to plant: the run ends when it is found, and the same history has to pass without it
    #[arg(long)]
    plant: Option<String>,
    /// Print every event
    #[arg(long)]
    verbose: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let plant = match &args.plant {
        None => None,
        Some(wanted) => match Plant::ALL.iter().find(|(name, _)| name == wanted) {
            Some((_, plant)) => Some(*plant),
            None => {
                let names = Plant::ALL.map(|(name, _)| name).join(", ");
                eprintln!("no bug {wanted:?}; there are {names}");
                return ExitCode::from(2);
            }
        },
    };
    let first = args.seed.unwrap_or(1);
    let runs = args.runs.unwrap_or(if args.seed.is_some() { 1 } else { 1000 });
    let plan = campaign::Plan {
        first,
        runs,
        plant,
        jobs: args.jobs.max(1),
        verbose: args.verbose || args.seed.is_some() && args.runs.is_none(),
    };
    let passed = if runs > parts::PART_RUNS && plant.is_none() {
        parts::run(&plan)
    } else {
        campaign::run(&plan)
    };
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
