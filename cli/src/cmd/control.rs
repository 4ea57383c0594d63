//! The commands that ask a running instance for something.
use std::time::{Duration, Instant};

use anyhow::Context;
use brep_block::CacheMode;
use brep_nbd::{Endpoint, NbdUri};
use brep_replication::config::{DiskFormat, PeerAddress};
use brep_replication::control::{ClientError, ControlClient};
use brep_replication::status::{DiskState, DiskStatus, LinkState, ResyncStatus, Status};
use serde_json::{Value, json};

use crate::args::{
    CheckpointArgs, ControlArgs, DiskArgs, DiskCommand, FailoverArgs, PeerArgs, PeerCommand,
    ResizeArgs, ResumeArgs, ResyncArgs, StartArgs, StopArgs, SwitchoverArgs, Target, Wait,
    peer_address,
};
use crate::exit::{Failure, OK, Outcome};
use crate::instances::Registry;
use crate::{output, units};

/// How often the progress of a resync is asked for.
const POLL_PAUSE: Duration = Duration::from_millis(200);
/// How much longer than the instance a command waits for the answer.
const GRACE: Duration = Duration::from_secs(2);

/// Connects to the instance that was named, or to the only one.
pub(crate) fn connect(args: &ControlArgs) -> Result<ControlClient, Failure> {
    let path = match &args.control {
        Some(path) if path.is_dir() => path.join("control.sock"),
        Some(path) => path.clone(),
        None => Registry::of_user().the_only_one()?,
    };
    Ok(ControlClient::connect(&path, args.timeout)?)
}

pub(crate) fn checkpoint(args: &CheckpointArgs) -> Outcome {
    let wait = match args.wait {
        Wait::Cut => "cut",
        Wait::Commit => "commit",
    };
    let limit = u64::try_from(args.control.timeout.as_millis()).unwrap_or(u64::MAX);
    let mut client = connect(&args.control)?;
    // The instance gives up at its limit, and says why; this side waits a little longer.
    client.set_timeout(args.control.timeout + GRACE);
    let answer = client.execute("checkpoint", json!({ "wait": wait, "timeout-ms": limit }))?;
    let done = if args.wait == Wait::Cut { "cut" } else { "committed" };
    report(&args.control, &answer, || match number(&answer, "epoch") {
        Some(epoch) => format!("checkpoint {epoch} {done}"),
        None => format!("checkpoint {done}"),
    })
}

pub(crate) fn failover(args: &FailoverArgs) -> Outcome {
    if args.commit {
        let answer = ask(&args.control, "failover-commit", Value::Null)?;
        return report(&args.control, &answer, || {
            let done =
                "the failover is final; the merge goes on in the background, see `brep status`";
            match answer["warning"].as_str() {
                Some(warning) => format!("{done}\nwarning: {warning}"),
                None => done.into(),
            }
        });
    }
    if let Some(name) = &args.test {
        let answer = ask(&args.control, "failover-test", json!({ "name": name }))?;
        return report(&args.control, &answer, || test_view(name, &answer));
    }
    if let Some(name) = &args.test_end {
        let answer = ask(&args.control, "failover-test-end", json!({ "name": name }))?;
        return report(&args.control, &answer, || format!("the test view {name} has ended"));
    }
    if args.rollback {
        let arguments = json!({ "discard-local": args.discard_local, "dry-run": args.dry_run });
        let answer = ask(&args.control, "failover-rollback", arguments)?;
        return report(&args.control, &answer, || match args.dry_run {
            true => discard_text(&answer),
            false => format!(
                "the failover is undone; this side becomes a secondary again\n{}",
                discard_text(&answer)
            ),
        });
    }
    let target = match args.to {
        Target::Checkpoint => "checkpoint",
        Target::Latest => "latest",
    };
    let answer = ask(&args.control, "failover", json!({ "to": target, "hold": args.hold }))?;
    report(&args.control, &answer, || promotion(args.to, &answer))
}

/// A scratch view, and where its disks are.
fn test_view(name: &str, answer: &Value) -> String {
    let mut text = match number(answer, "checkpoint") {
        Some(epoch) => format!("test view {name} of checkpoint {epoch}"),
        None => format!("test view {name}"),
    };
    for uri in answer.get("uris").and_then(Value::as_array).into_iter().flatten() {
        text.push_str(&format!("\n{}", uri.as_str().unwrap_or_default()));
    }
    text.push_str(&format!("\nbrep failover --test-end {name} ends it"));
    text
}

/// What a failover has done, and what may be missing.
fn promotion(target: Target, answer: &Value) -> String {
    let mut text = match (target, number(answer, "epoch")) {
        (Target::Latest, _) => String::from("promoted to the last write that was received"),
        (Target::Checkpoint, Some(epoch)) => format!("promoted to checkpoint {epoch}"),
        (Target::Checkpoint, None) => String::from("promoted to the last checkpoint"),
    };
    if answer.get("repeated").and_then(Value::as_bool) == Some(true) {
        text.push_str(" (it had been before)");
    } else if let Some(us) = number(answer, "took-us") {
        text.push_str(&format!(" in {}", units::duration(Duration::from_micros(us))));
    }
    if let Some(differing) = number(answer, "differing-bytes").map(units::bytes) {
        let fate = if target == Target::Latest { "was kept" } else { "was given up" };
        text.push_str(&format!("\nwritten since the checkpoint, at most {differing}: {fate}"));
    }
    let left_out = answer.get("left-out").and_then(Value::as_array).into_iter().flatten();
    for disk in left_out.filter_map(Value::as_str) {
        text.push_str(&format!(
            "\n{disk} is left out: it was being added, and not copied completely"
        ));
    }
    if let Some(ms) = number(answer, "last-contact-ms") {
        let ago = units::age(ms);
        text.push_str(&format!(
            "\nlast contact with the primary {ago} ago; if it went on alone since, it has more"
        ));
    }
    if answer.get("held").and_then(Value::as_bool) == Some(true) {
        text.push_str(
            "\nguests are served; held: brep failover --commit makes it final, brep failover \
             --rollback undoes it",
        );
        return text;
    }
    text.push_str(match target {
        Target::Latest => "\nguests are served; the disk files alone are the disks",
        Target::Checkpoint => {
            "\nguests are served; the merge goes on in the background, see `brep status`"
        }
    });
    text
}

pub(crate) fn start(args: &StartArgs) -> Outcome {
    let answer = ask(&args.control, "replication-start", Value::Null)?;
    report(&args.control, &answer, || "replication runs".into())
}

pub(crate) fn resume(args: &ResumeArgs) -> Outcome {
    let answer = ask(&args.control, "resume", json!({ "lonely": args.lonely }))?;
    report(&args.control, &answer, || "the guest goes on without the secondary".into())
}

pub(crate) fn stop(args: &StopArgs) -> Outcome {
    let arguments = json!({ "discard-checkpoint": args.discard_checkpoint });
    let mut client = connect(&args.control)?;
    let stopped = client.execute("replication-stop", arguments)?;
    // The answer to this one may lose the race against the end of the process.
    match client.execute("quit", Value::Null) {
        Ok(_) | Err(ClientError::Closed { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    wait_for_end(client, args.control.timeout)?;
    report(&args.control, &stopped, || "stopped".into())
}

/// Waits until the instance has closed its control socket, which it does last.
fn wait_for_end(mut client: ControlClient, timeout: Duration) -> Result<(), Failure> {
    let deadline = Instant::now() + timeout;
    loop {
        let remaining = deadline.saturating_duration_since(Instant::now());
        match client.next_event(remaining) {
            Err(ClientError::Closed { .. }) => return Ok(()),
            Ok(None) => {
                return Err(Failure::failed(format!(
                    "it was asked to stop, and is not done after {timeout:?}"
                )));
            }
            Ok(Some(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

pub(crate) fn resync(args: &ResyncArgs) -> Outcome {
    if args.discard_local {
        let arguments = json!({ "discard-local": true, "dry-run": args.dry_run });
        let answer = ask(&args.control, "resync", arguments)?;
        return report(&args.control, &answer, || discard_text(&answer));
    }
    let mut arguments = serde_json::Map::new();
    let flags = [
        ("full", args.full),
        ("compare", args.compare),
        ("discard-checkpoint", args.discard_checkpoint),
    ];
    for (name, given) in flags {
        if given {
            arguments.insert(name.into(), json!(true));
        }
    }
    if let Some(rate) = args.rate {
        arguments.insert("rate".into(), json!(rate.0.unwrap_or(0)));
    }
    if let Some(factor) = args.latency_factor {
        arguments.insert("latency-factor".into(), json!(factor.0.unwrap_or(0.0)));
    }
    let copies = args.full || args.compare || args.discard_checkpoint;
    if arguments.is_empty() && !args.wait {
        return Err(Failure::usage(
            "what the secondary lacks is copied by itself when it returns; to copy everything: brep \
             resync --full, to copy only what differs: --compare, to see it done: --wait",
        ));
    }
    let mut client = connect(&args.control)?;
    let before = Compared::now(&mut client)?;
    let mut answer = match arguments.is_empty() {
        true => json!({}),
        false => client.execute("resync", Value::Object(arguments))?,
    };
    if !copies && !args.wait {
        return report(&args.control, &answer, || "the limits of the resync are changed".into());
    }
    if !args.wait {
        return report(&args.control, &answer, || {
            "resync started; `brep status --watch` shows how far it is".into()
        });
    }
    wait_for_sync(&mut client, args.control.timeout)?;
    let compared = Compared::now(&mut client)?.since(before);
    answer["compared-bytes"] = json!(compared.bytes);
    answer["differing-bytes"] = json!(compared.differing);
    report(&args.control, &answer, || format!("in sync{}", compared.text()))
}

/// What copies have compared by hashes.
#[derive(Debug, Clone, Copy)]
struct Compared {
    bytes: u64,
    differing: u64,
}

impl Compared {
    fn now(client: &mut ControlClient) -> Result<Self, Failure> {
        let answer = client.execute("query-status", Value::Null)?;
        let bytes = |key| number(&answer["counters"], key).unwrap_or_default();
        Ok(Compared { bytes: bytes("compared-bytes"), differing: bytes("differing-bytes") })
    }

    fn since(self, before: Compared) -> Compared {
        Compared {
            bytes: self.bytes.saturating_sub(before.bytes),
            differing: self.differing.saturating_sub(before.differing),
        }
    }

    fn text(self) -> String {
        let bytes = units::bytes(self.bytes);
        match (self.bytes, self.differing) {
            (0, _) => String::new(),
            (_, 0) => format!(": {bytes} compared, nothing differed"),
            (_, differing) => format!(
                ": {bytes} compared, at most {} differed and were sent",
                units::bytes(differing)
            ),
        }
    }
}

/// What is given up, or would be.
pub(crate) fn discard_text(answer: &Value) -> String {
    let dry_run = answer.get("dry-run").and_then(Value::as_bool) == Some(true);
    let what = if dry_run { "would be given up" } else { "given up" };
    let amount = |value: &Value| match number(value, "bytes") {
        Some(bytes) => format!("at most {}", units::bytes(bytes)),
        None => "an unknown amount, possibly everything".into(),
    };
    let mut text = format!("{what}: {}", amount(answer));
    for disk in answer.get("disks").and_then(Value::as_array).into_iter().flatten() {
        let name = disk.get("disk").and_then(Value::as_str).unwrap_or_default();
        text.push_str(&format!("\n{name}: {}", amount(disk)));
        let ranges = disk.get("ranges").and_then(Value::as_array);
        for range in ranges.into_iter().flatten() {
            if let (Some(start), Some(len)) = (range[0].as_u64(), range[1].as_u64()) {
                text.push_str(&format!("\n  {start} to {}", start.saturating_add(len)));
            }
        }
        if disk.get("complete").and_then(Value::as_bool) != Some(true) && disk["bytes"].is_u64() {
            text.push_str("\n  ...");
        }
    }
    text
}

pub(crate) fn switchover(args: &SwitchoverArgs) -> Outcome {
    let limit = u64::try_from(args.control.timeout.as_millis()).unwrap_or(u64::MAX);
    let mut client = connect(&args.control)?;
    client.set_timeout(args.control.timeout + GRACE);
    let answer = client.execute("switchover", json!({ "timeout-ms": limit }))?;
    report(&args.control, &answer, || {
        let epoch =
            number(&answer, "epoch").map_or_else(String::new, |e| format!(" with checkpoint {e}"));
        match answer["role"].as_str() {
            Some("promoted") => format!(
                "this side has taken over{epoch}; the other one becomes its secondary, and guests \
                 are served here"
            ),
            _ => format!("the other side has taken over{epoch}; this one becomes its secondary"),
        }
    })
}

pub(crate) fn resize(args: &ResizeArgs) -> Outcome {
    let arguments = json!({ "device": args.disk, "size": args.size });
    let answer = ask(&args.control, "block_resize", arguments)?;
    report(&args.control, &answer, || {
        format!("{} has {} ({} bytes)", args.disk, units::bytes(args.size), args.size)
    })
}

pub(crate) fn disk(args: &DiskArgs) -> Outcome {
    let (control, name, answer, done, already) = match &args.command {
        DiskCommand::Add { control, disk } => {
            // As this process understands it: the instance may run in another directory.
            let file = std::path::absolute(&disk.file)?;
            let file = file.to_str().ok_or_else(|| {
                Failure::usage(format!("{}: only UTF-8 goes over the socket", file.display()))
            })?;
            let arguments = json!({
                "name": disk.name,
                "file": file,
                "format": match disk.format {
                    DiskFormat::Raw => "raw",
                    DiskFormat::Qcow2 => "qcow2",
                },
                "cache": match disk.cache {
                    CacheMode::Writeback => "writeback",
                    CacheMode::None => "none",
                },
            });
            let answer = ask(control, "disk-add", arguments)?;
            (control, &disk.name, answer, "added", "was part of the group already")
        }
        DiskCommand::Remove { control, disk, force, state_dir } => {
            let answer = match state_dir {
                Some(dir) => {
                    let changed = brep_replication::remove_disk_of_stopped(dir, disk, *force)?;
                    json!({ "name": disk, "changed": changed })
                }
                None => ask(control, "disk-remove", json!({ "name": disk, "force": force }))?,
            };
            (control, disk, answer, "removed", "had been removed already")
        }
    };
    report(control, &answer, || {
        let changed = answer.get("changed").and_then(Value::as_bool) != Some(false);
        format!("{name}: {}", if changed { done } else { already })
    })
}

pub(crate) fn peer(args: &PeerArgs) -> Outcome {
    match &args.command {
        PeerCommand::Set { control, uri } => {
            let PeerAddress { endpoint, group } = peer_address("peer set", uri.clone())?;
            // As this process understands it: the instance may run in another directory.
            let endpoint = match endpoint {
                Endpoint::Unix { path } => Endpoint::Unix { path: std::path::absolute(path)? },
                endpoint => endpoint,
            };
            let uri = NbdUri { endpoint: endpoint.clone(), ..uri.clone() }.to_string();
            let answer = ask(control, "peer-set", json!({ "uri": uri }))?;
            let peer = PeerAddress { endpoint, group };
            report(control, &answer, || format!("the peer is {peer}"))
        }
        PeerCommand::Clear { control } => {
            let answer = ask(control, "peer-clear", Value::Null)?;
            report(control, &answer, || "there is no peer any more".into())
        }
    }
}

/// Waits for the end of a resync, and shows its progress on a terminal. It has to begin within
/// `begin_limit`: the two sides may have to find each other again first.
fn wait_for_sync(client: &mut ControlClient, begin_limit: Duration) -> Result<(), Failure> {
    let bar = output::told_progress("resyncing");
    let mut lines = Lines::default();
    let deadline = Instant::now() + begin_limit;
    let mut begun = false;
    loop {
        let answer = client.execute("query-status", Value::Null)?;
        let status: Status = serde_json::from_value(answer).context("query-status")?;
        let every = |state| status.disks.iter().all(|disk| disk.state == state);
        if every(DiskState::InSync) {
            bar.finish_and_clear();
            return Ok(());
        }
        let is_copied =
            |disk: &DiskStatus| matches!(disk.state, DiskState::Resyncing | DiskState::Joining);
        let copying = status.disks.iter().any(is_copied);
        // A secondary that is lost meanwhile is connected to again; a refusal stays.
        let refused = status.link == LinkState::Refused;
        if (begun && refused) || (!begun && !copying && Instant::now() > deadline) {
            let what = if begun { "the resync has stopped" } else { "the resync does not begin" };
            let reason = status.reason.unwrap_or_else(|| "see brep status".into());
            return Err(Failure::failed(format!("{what}: {reason}")));
        }
        begun |= copying;
        if let Some(resync) = &status.resync {
            bar.set_length(resync.total);
            bar.set_position(resync.done);
            bar.set_message(super::status::resync(resync));
            if bar.is_hidden() {
                lines.show(resync);
            }
        }
        std::thread::sleep(POLL_PAUSE);
    }
}

/// Progress where there is no terminal: a line now and then.
#[derive(Default)]
struct Lines {
    shown: Option<Instant>,
}

impl Lines {
    const PAUSE: Duration = Duration::from_secs(5);

    fn show(&mut self, resync: &ResyncStatus) {
        if self.shown.is_none_or(|shown| shown.elapsed() >= Self::PAUSE) {
            self.shown = Some(Instant::now());
            eprintln!("resyncing: {}", super::status::resync(resync));
        }
    }
}

fn ask(args: &ControlArgs, command: &str, arguments: Value) -> Result<Value, Failure> {
    Ok(connect(args)?.execute(command, arguments)?)
}

fn report(args: &ControlArgs, answer: &Value, text: impl FnOnce() -> String) -> Outcome {
    if args.json {
        output::json(answer)?;
    } else {
        output::line(&text())?;
    }
    Ok(OK)
}

fn number(answer: &Value, key: &str) -> Option<u64> {
    answer.get(key).and_then(Value::as_u64)
}
