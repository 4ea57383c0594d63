//! `cargo xtask simulate`: histories of a replicated pair over simulated disks, links and time.

use std::process::Command;

use anyhow::Result;

use crate::fuzz;
use crate::process;
use crate::workspace::Workspace;

/// The simulator: never built together with the product, whose crates get doors for it.
pub(crate) const PACKAGE: &str = "brep-simulator";
const PROFILE: &str = "simulation";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// What the simulator takes: --seed S, --runs N, --jobs N, --plant NAME; see --help
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENT")]
    arguments: Vec<String>,
}

/// Builds the simulator and runs it.
pub(crate) fn main(args: &Args) -> Result<bool> {
    let workspace = Workspace::find()?;
    let mut cargo = command(&workspace);
    Ok(process::run(cargo.args(&args.arguments))?.success)
}

/// `cargo run` of the simulator, without arguments for it.
pub(crate) fn command(workspace: &Workspace) -> Command {
    let mut cargo = repeatable(workspace);
    cargo.args(["run", "--quiet", "--profile", PROFILE, "--package", PACKAGE, "--"]);
    cargo
}

/// The tests of the simulator itself, and of what else needs its doors.
pub(crate) fn tests(workspace: &Workspace) -> Command {
    let mut cargo = repeatable(workspace);
    cargo.args(["test", "--quiet", "--profile", PROFILE]);
    cargo.args(["--package", PACKAGE, "--package", fuzz::PACKAGE]);
    cargo
}

/// cargo, for a build in which tokio's own choices follow from a seed.
pub(crate) fn repeatable(workspace: &Workspace) -> Command {
    let mut cargo = workspace.cargo();
    let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    cargo.env("RUSTFLAGS", format!("{flags} --cfg tokio_unstable"));
    cargo
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_product_has_no_door_for_a_simulator() {
        let workspace = Workspace::find().unwrap();
        let tree = |package| {
            let arguments =
                ["tree", "--offline", "--edges", "normal,features", "--package", package];
            let output = workspace.cargo().args(arguments).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        };
        assert!(tree(PACKAGE).contains("feature \"simulation\""));
        assert!(!tree("brep").contains("simulation"));
    }
}
