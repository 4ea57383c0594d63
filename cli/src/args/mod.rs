//! What can be typed, and what it means.
mod address;
mod control;
mod copy;
mod disk;
mod drive;
mod export;
mod groups;
mod image;
mod nbd;
mod pair;
mod security;
mod tls;

pub(crate) use address::peer_address;
pub(crate) use control::{
    CheckpointArgs, ControlArgs, DiskArgs, DiskCommand, EventsArgs, FailoverArgs, PeerArgs,
    PeerCommand, ResizeArgs, ResumeArgs, ResyncArgs, StartArgs, StatusArgs, StopArgs,
    SwitchoverArgs, Target, Wait,
};
pub(crate) use copy::{CopyArgs, STREAM};
pub(crate) use disk::{format_by_name, unknown_format};
pub(crate) use export::ExportArg;
pub(crate) use groups::SecondariesArgs;
pub(crate) use image::{
    CheckArgs, CompareArgs, CreateArgs, ImageArgs, ImageCommand, InfoArgs, Repair,
};
pub(crate) use nbd::{
    NbdArgs, NbdCommand, NbdInfoArgs, NbdListArgs, NbdResizeArgs, NewSize, ServeArgs,
};
pub(crate) use pair::{DryRun, PrimaryArgs, SecondaryArgs};
pub(crate) use security::{ServerTls, tls_failure};
pub(crate) use tls::{DEFAULT_DAYS, InitArgs, IssueArgs, TlsArgs, TlsCommand};

use clap::{ArgAction, Args, Parser, Subcommand};

/// Block replication with continuous checkpoints, for virtual machine disks
///
/// A primary serves disks over NBD and forwards every write to a secondary, which keeps what the
/// writes overwrite. At any time the secondary can take over: from the last checkpoint, or from
/// the last write that was received.
#[derive(Debug, Parser)]
#[command(
    name = "brep",
    version,
    max_term_width = 100,
    after_help = "\
Two commands make a pair:
  brep secondary --disk vda=replica.raw --state-dir state-b --listen nbd://127.0.0.1:10809
  brep primary --disk vda=disk.raw --state-dir state-a --peer nbd://127.0.0.1:10809 \\
      --guest-listen 'nbd+unix:///?socket=vda.sock'

`brep demo` shows one at work. Exit codes: 0 done, 1 failed, 2 usage, 3 refused because of the
state. Log messages go to stderr; BREP_LOG (for example brep=debug) chooses which."
)]
pub(crate) struct Cli {
    /// Log more; twice, even more
    #[arg(short, long, action = ArgAction::Count, global = true)]
    pub(crate) verbose: u8,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Primary(Box<PrimaryArgs>),
    Secondary(Box<SecondaryArgs>),
    Secondaries(SecondariesArgs),
    Status(StatusArgs),
    Events(EventsArgs),
    Checkpoint(CheckpointArgs),
    Failover(FailoverArgs),
    Start(StartArgs),
    Stop(StopArgs),
    Resync(ResyncArgs),
    Resize(ResizeArgs),
    Disk(DiskArgs),
    Peer(PeerArgs),
    Resume(ResumeArgs),
    Switchover(SwitchoverArgs),
    Image(ImageArgs),
    Nbd(NbdArgs),
    Tls(TlsArgs),
    Demo(DemoArgs),
}

/// Show a pair at work: replicate, checkpoint, kill, fail over, compare
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Keep the disks, state and logs of the demo in this new directory
    #[arg(long, value_name = "DIR")]
    pub(crate) keep: Option<std::path::PathBuf>,
}
