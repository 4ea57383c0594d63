//! Opening a file: who it belongs to, whether it is whole, and what it says.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::backing::Backing;
use super::file::MapFile;
use super::header::{Bad, HEADER_BYTES, Header};
use super::in_flight::InFlightWords;
use super::layout::{CHUNK_BITS, CHUNK_WORDS, Layout, PAGE};
use super::rebuild::rebuild;
use super::set::{DIFFERS, OPEN, PENDING};
use super::{AfterPowerLoss, LastStop, Options, UNKNOWN_BOOT};
use crate::{Error, HBitmap, Result};

/// Opens a file of `maps` maps for exclusive use, verifies it, and marks it as in use. One of
/// another granularity, or of a disk that has grown, is converted.
pub(super) fn open(path: &Path, options: &Options, maps: usize) -> Result<MapFile> {
    let mut file = open_as_is(path, options, maps)?;
    let Header { size, granularity_log2: found, .. } = file.header;
    let wanted = if options.keep_granularity { found } else { options.granularity_log2 };
    let wanted_size = if options.keep_size { size } else { options.size };
    if (size, found) == (wanted_size, wanted) {
        return Ok(file);
    }
    rebuild(&mut file, wanted_size, wanted)
}

/// The same, with the size and the granularity that the file has.
pub(super) fn open_as_is(path: &Path, options: &Options, maps: usize) -> Result<MapFile> {
    let file = Backing::open(path)?;
    let (header, newest_copy) = read_header(&file, path)?;
    check_owner(&header, options, maps, path)?;
    let empty = HBitmap::new(header.size, header.granularity_log2)?;
    let layout = Layout::new(empty.bits(), maps, header.in_flight);
    let len = file.len_bytes().map_err(Error::io(path, "stat"))?;
    if len != layout.file_len() {
        return Err(corrupt(path, format!("{len} bytes long instead of {}", layout.file_len())));
    }
    let boot_id = options.current_boot_id(path);
    let last_stop = last_stop(&header, boot_id);
    let accepted = options.after_power_loss == AfterPowerLoss::Accept && header.logged;
    if last_stop == LastStop::PowerLost && !accepted {
        return Err(Error::PowerLost { path: path.to_owned() });
    }

    let words = file.map(path, len)?;
    let mut this = MapFile {
        path: path.to_owned(),
        words: Arc::new(words),
        _file: file,
        layout,
        header,
        newest_copy,
        maps: vec![empty; maps],
        in_flight: InFlightWords::default(),
        last_stop,
        boot_id,
        flush_failed: false,
    };
    load(&mut this)?;
    settle(&mut this)?;
    let mut header = this.header;
    header.clean = None;
    if last_stop != LastStop::PowerLost {
        // Else whoever is killed before he has set what was hot would find a kill the next time.
        header.boot_id = boot_id;
    }
    // What the last user's log covers stays covered until this one says otherwise.
    header.logged &= accepted;
    this.commit(header);
    // Before the first bit: a clean header must not be what a loss of power leaves behind.
    this.sync(layout.header_bytes())?;
    Ok(this)
}

fn corrupt(path: &Path, reason: impl Into<String>) -> Error {
    Error::Corrupt { path: path.to_owned(), reason: reason.into() }
}

fn last_stop(header: &Header, boot_id: [u8; 16]) -> LastStop {
    if header.clean.is_some() {
        LastStop::Clean
    } else if header.boot_id == boot_id && boot_id != UNKNOWN_BOOT {
        LastStop::Killed
    } else {
        LastStop::PowerLost
    }
}

/// The header that counts, and which copy it is.
fn read_header(file: &Backing, path: &Path) -> Result<(Header, u64)> {
    let not_a_bitmap = |reason: String| Error::NotABitmap { path: PathBuf::from(path), reason };
    let mut copies = [Err(Bad::Magic); 2];
    for (index, copy) in (0..).zip(&mut copies) {
        let mut bytes = [0; HEADER_BYTES];
        match file.read_exact_at(&mut bytes, index * PAGE) {
            Ok(()) => *copy = Header::decode(&bytes),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(error) => return Err(Error::io(path, "read")(error)),
        }
    }
    match copies {
        [Ok(a), Ok(b)] if a.sequence == b.sequence && a != b => {
            Err(corrupt(path, "the two copies of the header contradict each other"))
        }
        [Ok(a), Ok(b)] if b.sequence > a.sequence => Ok((b, 1)),
        [Ok(a), _] => Ok((a, 0)),
        [_, Ok(b)] => Ok((b, 1)),
        [Err(Bad::Version(version)), _] | [_, Err(Bad::Version(version))] => {
            Err(not_a_bitmap(format!("version {version} is not supported")))
        }
        [Err(Bad::Magic), Err(Bad::Magic)] => Err(not_a_bitmap("no magic number".to_owned())),
        _ => Err(corrupt(path, "no copy of the header is valid")),
    }
}

fn check_owner(header: &Header, options: &Options, maps: usize, path: &Path) -> Result<()> {
    let foreign = |reason: String| Err(Error::Foreign { path: PathBuf::from(path), reason });
    if header.identity != options.identity {
        return foreign(format!("it belongs to {}, not {}", header.identity, options.identity));
    }
    if header.maps != maps {
        return foreign(format!("it holds {} maps, not {maps}", header.maps));
    }
    if header.size > options.size {
        return foreign(format!("it is for {} items, not {}", header.size, options.size));
    }
    Ok(())
}

/// What was in flight when the last user of a set was killed differs.
fn settle(file: &mut MapFile) -> Result<()> {
    if file.last_stop == LastStop::Killed && file.header.maps > 1 {
        return file.interrupted_to(DIFFERS, &[OPEN, PENDING]);
    }
    // After a clean stop there is nothing; after a loss of power it says nothing.
    file.forget_in_flight();
    Ok(())
}

/// Fills the maps in memory from the file.
fn load(file: &mut MapFile) -> Result<()> {
    if file.header.clean.is_some_and(|crc| crc != file.tables_crc()) {
        return Err(corrupt(&file.path, "the chunk tables do not match their checksum"));
    }
    for map in 0..file.header.maps {
        for chunk in 0..file.layout.chunks {
            match load_chunk(file, map, chunk) {
                Ok(()) => {}
                Err(_) if file.last_stop == LastStop::PowerLost => distrust(file, map, chunk),
                Err(reason) => {
                    let bank = file.header.entries[map].bank;
                    return Err(corrupt(
                        &file.path,
                        format!("chunk {chunk} of bank {bank}: {reason}"),
                    ));
                }
            }
        }
    }
    Ok(())
}

fn load_chunk(file: &mut MapFile, map: usize, chunk: u64) -> Result<(), &'static str> {
    let entry = file.header.entries[map];
    let at = file.layout.state_word(entry.bank, chunk);
    let state = file.words.load(at);
    let (generation, sealed) = (state >> 1, state & 1 != 0);
    if state == 0 || generation >= file.header.next_generation {
        return Err("its state is not one that this header can have led to");
    }
    if generation != entry.generation {
        return Ok(());
    }
    let first_word = chunk * CHUNK_WORDS;
    let data = file.layout.data_word(entry.bank, first_word);
    let mut page = [0; PAGE as usize];
    let (words, _) = page.as_chunks_mut();
    for (index, word) in (data..).zip(words) {
        *word = file.words.load(index).to_le_bytes();
    }
    if sealed && u64::from(crc32fast::hash(&page)) != file.words.load(at + 1) {
        return Err("its contents do not match their checksum");
    }
    if !sealed && file.last_stop == LastStop::Clean {
        return Err("it was not sealed by a clean stop");
    }
    let bits = file.maps[map].bits();
    let (words, _) = page.as_chunks();
    let words = (first_word..).zip(words).map(|(word, bytes)| (word, u64::from_le_bytes(*bytes)));
    for (word, value) in words.clone() {
        let valid = bits.saturating_sub(word * 64).min(64) as u32;
        if value.checked_shr(valid).unwrap_or(0) != 0 {
            return Err("bits beyond the end are set");
        }
    }
    for (word, value) in words {
        file.maps[map].levels_mut().or_word(word, value);
    }
    Ok(())
}

/// Takes a chunk that makes no sense as dirty from end to end. Its state is put right last, so
/// that it stays senseless if this is interrupted.
///
/// Where there is no map, only a change of roles since the last flush can have led to the chunk,
/// and so only bits that the caller sets again.
fn distrust(file: &mut MapFile, map: usize, chunk: u64) {
    let entry = file.header.entries[map];
    let levels = file.maps[map].levels_mut();
    let (first, end) = (chunk * CHUNK_BITS, ((chunk + 1) * CHUNK_BITS).min(levels.bits()));
    if first < end && entry.present {
        levels.set(first, end - 1);
    }
    for word in chunk * CHUNK_WORDS..(chunk + 1) * CHUNK_WORDS {
        let bits = if word < levels.words() { levels.word(word) } else { 0 };
        file.words.store(file.layout.data_word(entry.bank, word), bits);
    }
    file.words.store(file.layout.state_word(entry.bank, chunk), entry.generation << 1);
}
