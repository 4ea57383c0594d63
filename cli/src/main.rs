//! The `brep` program: block replication with continuous checkpoints for virtual machine disks.
mod args;
mod cmd;
mod exit;
mod instances;
mod output;
mod systemd;
mod units;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command, ImageCommand, NbdCommand, TlsCommand};
use crate::exit::{Failure, Outcome};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    match start_log(&cli).and_then(|()| run(cli.command)) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            output::error(&failure);
            ExitCode::from(failure.code)
        }
    }
}

fn run(command: Command) -> Outcome {
    match command {
        Command::Primary(args) => cmd::pair::run(args.resolve()?, None),
        Command::Secondary(args) => {
            let dry_run = args.dry_run();
            cmd::pair::run(args.resolve()?, dry_run)
        }
        Command::Secondaries(args) => cmd::pair::run_groups(&args),
        Command::Status(args) => cmd::status::run(&args),
        Command::Events(args) => cmd::events::run(&args),
        Command::Checkpoint(args) => cmd::control::checkpoint(&args),
        Command::Failover(args) => cmd::control::failover(&args),
        Command::Start(args) => cmd::control::start(&args),
        Command::Stop(args) => cmd::control::stop(&args),
        Command::Resync(args) => cmd::control::resync(&args),
        Command::Resize(args) => cmd::control::resize(&args),
        Command::Disk(args) => cmd::control::disk(&args),
        Command::Peer(args) => cmd::control::peer(&args),
        Command::Resume(args) => cmd::control::resume(&args),
        Command::Switchover(args) => cmd::control::switchover(&args),
        Command::Image(args) => match args.command {
            ImageCommand::Create(args) => cmd::image::create::run(&args),
            ImageCommand::Info(args) => cmd::image::info::run(&args),
            ImageCommand::Check(args) => cmd::image::check::run(&args),
            ImageCommand::Compare(args) => cmd::image::compare::run(&args),
        },
        Command::Nbd(args) => match args.command {
            NbdCommand::Serve(args) => cmd::nbd::serve::run(*args),
            NbdCommand::Info(args) => cmd::nbd::info::run(&args),
            NbdCommand::List(args) => cmd::nbd::list::run(&args),
            NbdCommand::Resize(args) => cmd::nbd::resize::run(&args),
            NbdCommand::Copy(args) => cmd::nbd::copy::run(&args),
        },
        Command::Tls(args) => match args.command {
            TlsCommand::Init(args) => cmd::tls::init(&args),
            TlsCommand::Issue(args) => cmd::tls::issue(&args),
        },
        Command::Demo(args) => cmd::demo::run(&args),
    }
}

/// Help and version succeed; everything else is a usage error, with the code of the command.
fn usage(error: &clap::Error) -> ExitCode {
    // Nothing is left to be done if the terminal is gone.
    let _ = error.print();
    if !error.use_stderr() {
        return ExitCode::SUCCESS;
    }
    let mut words = std::env::args().skip(1).filter(|word| !word.starts_with('-'));
    let checking = words.next().as_deref() == Some("image")
        && matches!(words.next().as_deref(), Some("check" | "compare"));
    ExitCode::from(if checking { cmd::image::USAGE } else { exit::USAGE })
}

/// Sends log messages to stderr: those that `BREP_LOG` asks for, else those that suit the
/// command.
fn start_log(cli: &Cli) -> Result<(), Failure> {
    use std::io::IsTerminal;
    use tracing_subscriber::EnvFilter;

    let daemon = matches!(
        cli.command,
        Command::Primary(_) | Command::Secondary(_) | Command::Secondaries(_)
    );
    let level = match (cli.verbose, daemon) {
        (0, false) => "warn",
        (0, true) | (1, false) => "info",
        (1, true) | (2, false) => "debug",
        _ => "trace",
    };
    let filter = match std::env::var("BREP_LOG") {
        Ok(text) if !text.is_empty() => EnvFilter::try_new(&text)
            .map_err(|error| Failure::usage(format!("BREP_LOG={text:?}: {error}")))?,
        _ => EnvFilter::new(level),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    Ok(())
}
