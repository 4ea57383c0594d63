//! What happens in the demo, in its order.
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use brep_replication::control::ControlClient;
use brep_replication::status::{DiskState, Status};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::disk::{self, Random};
use super::guest::{Guest, Load, connect, read_all};
use super::pair::{self, DISK, PATIENCE, Side};
use crate::cmd::runtime::current_thread;
use crate::exit::Failure;
use crate::output::{self, Colour, Paint};
use crate::units;

/// Rounds of writes that end in a checkpoint; in all but the last it comes in their midst.
const ROUNDS: u64 = 3;
/// Writes of a round, unless the time is over first.
const WRITES: u64 = 2_000;
const LOAD_TIME: Duration = Duration::from_secs(1);
const WRITES_AT_A_TIME: usize = 250;
const BEFORE_CHECKPOINT: Duration = Duration::from_millis(50);

pub(super) fn tell(directory: &Path) -> Result<(), Failure> {
    let mut story = Story {
        runtime: current_thread()?,
        begin: Instant::now(),
        paint: Paint::for_stdout(),
        random: Random::new(7),
    };
    story.say(&format!("a pair on this machine, in {}", directory.display()))?;
    let (mut primary, mut secondary) = story.start(directory)?;
    let guest = story.runtime.block_on(Guest::start(&pair::uri(directory, "primary", DISK)))?;
    let Replicated { at_checkpoint, at_end } = story.replicate(guest, &mut primary)?;
    story.fail_over(directory, primary, &mut secondary, &at_checkpoint, &at_end)?;
    story.merge(directory, secondary, &at_checkpoint)?;
    let took = units::duration(story.begin.elapsed());
    story.good(&format!("done in {took}: nothing that the checkpoint held was lost"))
}

/// What the disk held at the last checkpoint, and when the primary was killed.
struct Replicated {
    at_checkpoint: Vec<u8>,
    at_end: Vec<u8>,
}

/// A checkpoint that was committed.
struct Checkpoint {
    epoch: Value,
    took: Duration,
    pause: Duration,
}

impl Checkpoint {
    fn take(control: &mut ControlClient) -> anyhow::Result<Self> {
        let begin = Instant::now();
        let mut answer = control.execute("checkpoint", json!({ "wait": "commit" }))?;
        let took = begin.elapsed();
        let pause = Duration::from_micros(pair::status(control)?.counters.last_pause_us);
        Ok(Checkpoint { epoch: answer["epoch"].take(), took, pause })
    }
}

struct Story {
    runtime: Runtime,
    begin: Instant,
    paint: Paint,
    random: Random,
}

impl Story {
    fn say(&self, text: &str) -> Result<(), Failure> {
        let at = format!("{:5.2} s", self.begin.elapsed().as_secs_f64());
        output::line(&format!("{}  {text}", self.paint.apply(Colour::Dim, &at)))
    }

    fn good(&self, text: &str) -> Result<(), Failure> {
        self.say(&format!("{} {text}", self.paint.apply(Colour::Green, "✓")))
    }

    fn start(&self, directory: &Path) -> Result<(Side, Side), Failure> {
        let contents = disk::make()?;
        let files = disk::list(&contents)?.len();
        std::fs::write(directory.join("disk.raw"), &contents).context("disk.raw")?;
        let replica = std::fs::File::create(directory.join("replica.raw"));
        replica.and_then(|file| file.set_len(contents.len() as u64)).context("replica.raw")?;
        let size = units::bytes(contents.len() as u64);
        self.say(&format!("disk.raw: {size}, a FAT file system with {files} files"))?;

        let mut secondary = pair::secondary(directory)?;
        secondary.control()?;
        self.say(&format!("secondary started (pid {}), its replica is empty", secondary.pid()))?;
        let begin = Instant::now();
        let mut primary = pair::primary(directory)?;
        self.say(&format!("primary started (pid {}), copies the disk", primary.pid()))?;
        let synced = |status: &Status| {
            let in_sync = status.disks.iter().all(|disk| disk.state == DiskState::InSync);
            in_sync && status.checkpoint.is_some()
        };
        let status = primary.wait_for("in sync", synced)?;
        let epoch = status.checkpoint.unwrap_or(0);
        let took = begin.elapsed();
        let rate = units::bytes(rate(contents.len() as u64, took));
        self.good(&format!("in sync at checkpoint {epoch}, {} ({rate}/s)", units::duration(took)))?;
        Ok((primary, secondary))
    }

    /// Writes and takes checkpoints; then writes more that no checkpoint holds.
    fn replicate(&mut self, mut guest: Guest, primary: &mut Side) -> Result<Replicated, Failure> {
        let mut control = primary.control()?;
        for round in 1..=ROUNDS {
            let text = format!("note {round}: written through the primary's NBD export\r\n");
            let files = guest.edit_files(|root| {
                root.write(&format!("note-{round}.txt"), text.repeat(500).as_bytes())
            });
            let files = self.runtime.block_on(files)?;
            let mut under_load = None;
            let load = if round < ROUNDS {
                let taken = self.load_with_checkpoint(&mut guest, &mut control);
                let (load, checkpoint) = taken?;
                under_load = Some(checkpoint);
                load
            } else {
                self.load(&mut guest)?
            };
            self.tell_load(&format!("note-{round}.txt and a random load"), files, load)?;
            match under_load {
                Some(checkpoint) => self.tell_checkpoint("while that went on: ", &checkpoint)?,
                None => self.tell_checkpoint("", &Checkpoint::take(&mut control)?)?,
            }
        }
        let at_checkpoint = self.runtime.block_on(guest.read_back())?;
        ensure(at_checkpoint == guest.contents(), "the primary's export is not what was written")?;
        self.say("copied the primary through NBD: this is what the checkpoint has to give back")?;

        let files = guest.edit_files(|root| {
            root.write("note-1.txt", b"overwritten after the checkpoint\r\n")?;
            root.write("unsaved.txt", &b"never part of a checkpoint\r\n".repeat(1000))?;
            root.remove("photos/07.jpg")
        });
        let files = self.runtime.block_on(files)?;
        let load = self.load(&mut guest)?;
        self.tell_load("overwrote, deleted and added files; more load", files, load)?;
        let at_end = self.runtime.block_on(guest.read_back())?;
        ensure(at_end == guest.contents(), "the primary's export is not what was written")?;
        let counters = pair::status(&mut control)?.counters;
        self.say(&format!(
            "replicated so far, first copy included: {} writes, {}",
            units::count(counters.replicated_writes),
            units::bytes(counters.replicated_bytes)
        ))?;
        Ok(Replicated { at_checkpoint, at_end })
    }

    fn tell_load(&self, what: &str, files: Load, load: Load) -> Result<(), Failure> {
        let writes = units::count(files.writes + load.writes);
        let bytes = units::bytes(files.bytes + load.bytes);
        let rate = units::count(rate(load.writes, load.took));
        self.say(&format!("{what}: {writes} writes, {bytes}, {rate} writes/s, on both sides"))
    }

    /// Writes for a while, on a slow machine fewer blocks.
    fn load(&mut self, guest: &mut Guest) -> Result<Load, Failure> {
        let begin = Instant::now();
        let mut load = Load::default();
        while load.writes < WRITES && begin.elapsed() < LOAD_TIME {
            let part = guest.write_at_random(&mut self.random, WRITES_AT_A_TIME);
            load += self.runtime.block_on(part)?;
        }
        Ok(load)
    }

    /// The same, and in the midst of it a checkpoint.
    fn load_with_checkpoint(
        &mut self,
        guest: &mut Guest,
        control: &mut ControlClient,
    ) -> Result<(Load, Checkpoint), Failure> {
        std::thread::scope(|scope| {
            let checkpoint = scope.spawn(|| {
                std::thread::sleep(BEFORE_CHECKPOINT);
                Checkpoint::take(control)
            });
            let load = self.load(guest);
            let checkpoint = checkpoint.join();
            let checkpoint = checkpoint.map_err(|_| Failure::failed("a thread has panicked"))?;
            Ok((load?, checkpoint?))
        })
    }

    fn tell_checkpoint(&self, when: &str, checkpoint: &Checkpoint) -> Result<(), Failure> {
        let Checkpoint { epoch, took, pause } = checkpoint;
        let (took, pause) = (units::duration(*took), units::duration(*pause));
        self.good(&format!("{when}checkpoint {epoch} in {took}; forwarding paused for {pause}"))
    }

    fn fail_over(
        &self,
        directory: &Path,
        primary: Side,
        secondary: &mut Side,
        at_checkpoint: &[u8],
        at_end: &[u8],
    ) -> Result<(), Failure> {
        let mut control = secondary.control()?;
        primary.kill()?;
        let killed = Instant::now();
        self.say(&self.paint.apply(Colour::Red, "killed the primary (SIGKILL)"))?;
        control.set_timeout(PATIENCE);
        let begin = Instant::now();
        control.execute("failover", json!({ "to": "checkpoint" }))?;
        let commanded = begin.elapsed();
        let uri = pair::uri(directory, "secondary", DISK);
        let promoted = self.runtime.block_on(async {
            let connection = connect(&uri).await?;
            brep_block::BlockDevice::read(&*connection, 0, 4096).await?;
            self.good(&format!(
                "failed over in {}; the first read was answered {} after the kill",
                units::duration(commanded),
                units::duration(killed.elapsed())
            ))?;
            Ok::<_, Failure>(read_all(&*connection).await?)
        })?;

        let lost = differences(at_end, at_checkpoint);
        ensure(lost > 0, "the writes after the checkpoint have changed nothing")?;
        self.say(&format!(
            "latest and checkpoint differ in {} bytes: that much had been written since",
            units::count(lost)
        ))?;
        let wrong = differences(&promoted, at_checkpoint);
        ensure(wrong == 0, &format!("the promoted export is wrong in {wrong} bytes"))?;
        self.good("the promoted export is the checkpoint, byte by byte")?;
        let (files, expected) = (disk::list(&promoted)?, disk::list(at_checkpoint)?);
        ensure(files == expected, "the files are not those of the checkpoint")?;
        self.good(&format!(
            "its {} files have the right SHA-256; note-1.txt is the old one, photos/07.jpg is back",
            files.len()
        ))
    }

    fn merge(
        &self,
        directory: &Path,
        mut secondary: Side,
        at_checkpoint: &[u8],
    ) -> Result<(), Failure> {
        let merged =
            |status: &Status| status.disks.iter().all(|disk| disk.state == DiskState::Promoted);
        secondary.wait_for("merged", merged)?;
        self.say("merged in the background")?;
        secondary.terminate()?;
        let alone = std::fs::read(directory.join("replica.raw")).context("replica.raw")?;
        let wrong = differences(&alone, at_checkpoint);
        ensure(wrong == 0, &format!("replica.raw is wrong in {wrong} bytes"))?;
        self.good("replica.raw alone is the checkpoint, byte by byte")
    }
}

fn ensure(condition: bool, otherwise: &str) -> Result<(), Failure> {
    if condition { Ok(()) } else { Err(Failure::failed(otherwise)) }
}

/// In how many bytes two disks differ; a missing byte differs.
fn differences(a: &[u8], b: &[u8]) -> u64 {
    const BLOCK_LEN: usize = 4096;
    let blocks = a.chunks(BLOCK_LEN).zip(b.chunks(BLOCK_LEN)).filter(|(a, b)| a != b);
    let common: usize = blocks.map(|(a, b)| a.iter().zip(b).filter(|(a, b)| a != b).count()).sum();
    (common + a.len().abs_diff(b.len())) as u64
}

fn rate(count: u64, took: Duration) -> u64 {
    (count as f64 / took.as_secs_f64().max(1e-6)) as u64
}
