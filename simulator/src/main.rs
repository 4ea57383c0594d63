#![doc = include_str!("../README.md")]
mod acts;
mod added;
mod campaign;
mod disk;
mod ending;
mod features;
mod file;
mod files;
mod guest;
mod held;
mod history;
mod model;
mod names;
mod network;
mod pace;
mod parts;
#[cfg(test)]
mod power_points;
mod quorum;
mod rng;
mod roles;
mod second;
mod seen;
mod side;
mod test_view;
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
    /// Look for each of the bugs that can be planted, in 10000 histories at most
    #[arg(long, conflicts_with = "plant")]
    plants: bool,
    /// Print every event; twice: and every operation
    #[arg(long, action = clap::ArgAction::Count)]
    verbose: u8,
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
        verbose: args.verbose.max(u8::from(args.seed.is_some() && args.runs.is_none())),
    };
    if args.plants {
        let plan = campaign::Plan { runs: args.runs.unwrap_or(10_000), verbose: 0, ..plan };
        return if campaign::find_all(&plan) { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let passed = if runs > parts::PART_RUNS && plant.is_none() {
        parts::run(&plan)
    } else {
        campaign::run(&plan)
    };
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
