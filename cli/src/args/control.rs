use std::path::PathBuf;
use std::time::Duration;

use brep_nbd::NbdUri;
use clap::{Args, Subcommand, ValueEnum};

use super::disk::DiskArg;
use crate::units::{Factor, Rate, parse_duration, parse_factor, parse_rate, parse_size};

/// Which instance to talk to, and how.
#[derive(Debug, Args)]
pub(crate) struct ControlArgs {
    /// Control socket of the instance, or its state directory [default: the one instance that runs]
    #[arg(long, value_name = "SOCKET")]
    pub(crate) control: Option<PathBuf>,

    /// How long to wait for the answer
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    pub(crate) timeout: Duration,

    /// Print the answer as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Show the state of an instance
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) control: ControlArgs,

    /// Show it again and again
    #[arg(long, value_name = "INTERVAL", num_args = 0..=1, default_missing_value = "1s",
        value_parser = parse_duration)]
    pub(crate) watch: Option<Duration>,
}

/// Show the present state, and then what happens
#[derive(Debug, Args)]
#[command(after_help = "\
A line each: time, number, name, and what belongs to it; with --json an object a line. The first is
the state as it is now, BREP_STATE; another follows whenever it changes. A reader that is too slow
loses events: it is told EVENTS_LOST with their count, and the state again. Ends with the instance.")]
pub(crate) struct EventsArgs {
    #[command(flatten)]
    pub(crate) control: ControlArgs,
}

/// Take a checkpoint now
#[derive(Debug, Args)]
pub(crate) struct CheckpointArgs {
    #[command(flatten)]
    pub(crate) control: ControlArgs,

    /// What to wait for: until the epoch is cut, or until it is committed
    #[arg(long, value_name = "MOMENT", default_value = "commit")]
    pub(crate) wait: Wait,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Wait {
    Cut,
    Commit,
}

/// Make a secondary the one that serves the disks
#[derive(Debug, Args)]
#[command(after_help = "\
A failover to the checkpoint is possible whenever there is one. A failover to the latest write is
possible after unbroken synchronous replication; it loses nothing that was acknowledged while the
two sides were in contact. See `brep status` for which is offered.

With --hold it can be undone: guests are served and may write, nothing is merged, and there is no
secondary. --commit makes it final, --rollback gives up what was written since.")]
pub(crate) struct FailoverArgs {
    #[command(flatten)]
    pub(crate) control: ControlArgs,

    /// What the disks become: the last checkpoint, or everything that was received
    #[arg(long, value_name = "TARGET", default_value = "checkpoint")]
    pub(crate) to: Target,

    /// Keep a way back, until --commit or --rollback
    #[arg(long)]
    pub(crate) hold: bool,

    /// Make a failover that is held final
    #[arg(long, conflicts_with_all = ["to", "hold"])]
    pub(crate) commit: bool,

    /// Undo a failover that is held: this side is a secondary again
    #[arg(long, conflicts_with_all = ["to", "hold", "commit"])]
    pub(crate) rollback: bool,

    /// Open a writable scratch view of the last checkpoint under this name; replication goes on
    #[arg(long, value_name = "NAME", conflicts_with_all = ["to", "hold", "commit", "rollback"])]
    pub(crate) test: Option<String>,

    /// End the scratch view of this name
    #[arg(long, value_name = "NAME",
        conflicts_with_all = ["to", "hold", "commit", "rollback", "test"])]
    pub(crate) test_end: Option<String>,

    /// With --rollback: give up what was written since the failover
    #[arg(long, requires = "rollback")]
    pub(crate) discard_local: bool,

    /// With --rollback: only say what would be lost
    #[arg(long, requires = "rollback")]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Target {
    Checkpoint,
    Latest,
}

/// Begin to replicate: after --no-start, or again after a stop by command
#[derive(Debug, Args)]
#[command(after_help = "\
On a secondary that is run with --plain-primary it says that both sides' disks are equal now: what
the disk holds becomes the checkpoint.")]
pub(crate) struct StartArgs {
    #[command(flatten)]
    pub(crate) control: ControlArgs,
}

/// Let the guest's writes go on that `--on-peer-lost suspend` holds
#[derive(Debug, Args)]
#[command(after_help = "\
They go on by themselves when the secondary is back. Before --lonely make sure that nobody promotes
the secondary, or has done so: this side then writes alone, on a line of its own.")]
pub(crate) struct ResumeArgs {
    #[command(flatten)]
    pub(crate) control: ControlArgs,

    /// Go on without the secondary
    #[arg(long, required = true)]
    pub(crate) lonely: bool,
}

/// Stop an instance; its buffers are kept
#[derive(Debug, Args)]
#[command(after_help = "\
SIGTERM and SIGINT stop an instance cleanly too, and never drop anything. A secondary that holds
the pre-images of a checkpoint is stopped this way, or with --discard-checkpoint, which drops
them: the replica then is what was received last, and there is no checkpoint to go back to.")]
pub(crate) struct StopArgs {
    #[command(flatten)]
    pub(crate) control: ControlArgs,

    /// Drop the pre-images of the last checkpoint
    #[arg(long)]
    pub(crate) discard_checkpoint: bool,
}

/// Bring a secondary that was away back into sync
#[derive(Debug, Args)]
pub(crate) struct ResyncArgs {
    #[command(flatten)]
    pub(crate) control: ControlArgs,

    /// Copy everything
    #[arg(long)]
    pub(crate) full: bool,

    /// Compare everything by hashes, and copy what differs; with --full the same
    #[arg(long)]
    pub(crate) compare: bool,

    /// Give the secondary's last checkpoint up, and with it the room for its pre-images
    ///
    /// Until the copy has ended the secondary is inconsistent: it cannot be promoted.
    #[arg(long)]
    pub(crate) discard_checkpoint: bool,

    /// Bytes a second that a resync copies at most, or off; changes one that runs, too
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub(crate) rate: Option<Rate>,

    /// How many times as long the guest's writes may take as without the copy, or off
    #[arg(long, value_name = "FACTOR", value_parser = parse_factor)]
    pub(crate) latency_factor: Option<Factor>,
    /// On a secondary: give up what it has and its primary lacks
    ///
    /// Of an old primary that returns, what it wrote by itself. The copy begins with the next
    /// contact.
    #[arg(long, conflicts_with_all = ["full", "wait"])]
    pub(crate) discard_local: bool,

    /// With --discard-local: only say what would be lost
    #[arg(long, requires = "discard_local")]
    pub(crate) dry_run: bool,

    /// Wait until both sides are in sync, however long that takes
    #[arg(long)]
    pub(crate) wait: bool,
}

/// Let the secondary take over, without losing a write
#[derive(Debug, Args)]
#[command(after_help = "\
On either side: the secondary passes it on to its primary. The guest is held, everything is drained into
a checkpoint, and the two sides change their roles. It needs --listen on both sides, and on the
secondary --peer or `brep peer set`. If it cannot be done nothing is changed.")]
pub(crate) struct SwitchoverArgs {
    #[command(flatten)]
    pub(crate) control: ControlArgs,
}

/// Make a disk larger while it is used
#[derive(Debug, Args)]
#[command(after_help = "\
On the primary. Its disk grows at once and the secondary's follows; the secondary connects again for
it. Guests learn the new size when they connect again. Image files grow, raw or qcow2; block devices
do not.")]
pub(crate) struct ResizeArgs {
    #[command(flatten)]
    pub(crate) control: ControlArgs,

    /// Name of the disk
    #[arg(value_name = "NAME")]
    pub(crate) disk: String,

    /// The new size in bytes, or with K, M, G, T
    #[arg(value_name = "SIZE", value_parser = parse_size)]
    pub(crate) size: u64,
}

/// Add a disk to a group that runs, or take one out of it
#[derive(Debug, Args)]
pub(crate) struct DiskArgs {
    #[command(subcommand)]
    pub(crate) command: DiskCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DiskCommand {
    /// Add a disk, now and after a restart: on the secondary first, then on the primary
    ///
    /// The primary serves it at once, and the secondary gets a copy; until that has ended no
    /// checkpoint holds the new disk.
    Add {
        #[command(flatten)]
        control: ControlArgs,

        /// NAME=FILE[,format=raw|qcow2][,cache=writeback|none], as with --disk
        #[arg(value_name = "NAME=FILE")]
        disk: DiskArg,
    },
    /// Take a disk out of the group, now and after a restart: on the primary, the secondary follows
    ///
    /// Its file stays what it is.
    Remove {
        #[command(flatten)]
        control: ControlArgs,

        /// Name of the disk
        #[arg(value_name = "NAME")]
        disk: String,

        /// On a primary, also if guests use it: they are cut off. On a secondary, also out of the
        /// last checkpoint
        #[arg(long)]
        force: bool,

        /// Of a side that does not run, and cannot without the disk's file: its state directory
        #[arg(long, value_name = "DIR", conflicts_with = "control")]
        state_dir: Option<PathBuf>,
    },
}

/// Say where the other side is, while this one runs
#[derive(Debug, Args)]
pub(crate) struct PeerArgs {
    #[command(subcommand)]
    pub(crate) command: PeerCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PeerCommand {
    /// Replicate to this address, now and after a restart
    ///
    /// On a secondary: once it has been promoted. --peer at a start goes before what is set here.
    Set {
        #[command(flatten)]
        control: ControlArgs,

        /// Where the other side listens
        #[arg(value_name = "URI")]
        uri: NbdUri,
    },
    /// Replicate to nobody any more; the guest goes on alone
    Clear {
        #[command(flatten)]
        control: ControlArgs,
    },
}
