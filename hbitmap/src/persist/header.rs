//! The header: what is switched as a whole. The layout is described in the parent module.

use super::in_flight::IN_FLIGHT_WORDS;
use super::layout::CHUNK_WORDS;
use super::{Identity, Tag};

pub(super) const HEADER_BYTES: usize = 256;
const MAGIC: [u8; 8] = *b"brep-map";
const VERSION: u32 = 2;
const CRC_OFFSET: usize = 12;
const ENTRIES_OFFSET: usize = 88;
const ENTRY_BYTES: usize = 40;
const IN_FLIGHT_OFFSET: usize = 208;
const LOGGED_OFFSET: usize = 216;
pub(super) const MAPS_MAX: usize = 3;
/// Far more than anybody has a use for.
const IN_FLIGHT_MAX: u64 = 1 << 20;
const STATE_IN_USE: u32 = 0;
const STATE_CLEAN: u32 = 1;

/// One map: where it lies, and which of the chunks there are its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) bank: u32,
    pub(super) present: bool,
    pub(super) generation: u64,
    pub(super) tag: Tag,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) sequence: u64,
    pub(super) identity: Identity,
    pub(super) size: u64,
    pub(super) granularity_log2: u32,
    pub(super) next_generation: u64,
    pub(super) boot_id: [u8; 16],
    /// After a clean stop, the CRC of the chunk tables.
    pub(super) clean: Option<u32>,
    pub(super) maps: usize,
    /// Words for what is in flight.
    pub(super) in_flight: u64,
    /// While it is in use, a log says where a loss of power may take bits away.
    pub(super) logged: bool,
    pub(super) entries: [Entry; MAPS_MAX],
}

/// Why 256 bytes are not a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bad {
    Magic,
    Version(u32),
    Checksum,
    Contents,
}

impl Header {
    pub(super) fn new(
        identity: Identity,
        size: u64,
        granularity_log2: u32,
        boot_id: [u8; 16],
        maps: usize,
        tag: Tag,
    ) -> Self {
        let mut entries = [Entry { bank: 0, present: true, generation: 0, tag }; MAPS_MAX];
        for (bank, entry) in (0..).zip(&mut entries[..maps]) {
            entry.bank = bank;
            entry.generation = u64::from(bank) + 1;
            // Of a set, pending: no cut is outstanding.
            entry.present = bank != 1;
        }
        Header {
            sequence: 0,
            identity,
            size,
            granularity_log2,
            next_generation: maps as u64 + 1,
            boot_id,
            clean: None,
            maps,
            in_flight: if maps > 1 { IN_FLIGHT_WORDS } else { 0 },
            logged: false,
            entries,
        }
    }

    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |offset: usize, field: &[u8]| {
            bytes[offset..offset + field.len()].copy_from_slice(field);
        };
        let (state, tables_crc) = match self.clean {
            Some(crc) => (STATE_CLEAN, crc),
            None => (STATE_IN_USE, 0),
        };
        put(0, &MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(16, &self.sequence.to_le_bytes());
        put(24, &self.identity.0);
        put(40, &self.size.to_le_bytes());
        put(48, &self.granularity_log2.to_le_bytes());
        put(52, &(self.maps as u32).to_le_bytes());
        put(56, &self.next_generation.to_le_bytes());
        put(64, &self.boot_id);
        put(80, &state.to_le_bytes());
        put(84, &tables_crc.to_le_bytes());
        put(IN_FLIGHT_OFFSET, &self.in_flight.to_le_bytes());
        put(LOGGED_OFFSET, &u32::from(self.logged).to_le_bytes());
        for (index, entry) in self.entries[..self.maps].iter().enumerate() {
            let offset = ENTRIES_OFFSET + index * ENTRY_BYTES;
            put(offset, &entry.bank.to_le_bytes());
            put(offset + 4, &u32::from(entry.present).to_le_bytes());
            put(offset + 8, &entry.generation.to_le_bytes());
            put(offset + 16, &entry.tag.id);
            put(offset + 32, &entry.tag.number.to_le_bytes());
        }
        let crc = crc32fast::hash(&bytes);
        bytes[CRC_OFFSET..CRC_OFFSET + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Header, Bad> {
        if field::<8>(bytes, 0) != MAGIC {
            return Err(Bad::Magic);
        }
        let mut unsummed = *bytes;
        unsummed[CRC_OFFSET..CRC_OFFSET + 4].fill(0);
        if crc32fast::hash(&unsummed) != u32_at(bytes, CRC_OFFSET) {
            return Err(Bad::Checksum);
        }
        // After the checksum: a number that is garbage is not a version.
        if u32_at(bytes, 8) != VERSION {
            return Err(Bad::Version(u32_at(bytes, 8)));
        }
        let maps = u32_at(bytes, 52) as usize;
        let clean = match u32_at(bytes, 80) {
            STATE_IN_USE => None,
            STATE_CLEAN => Some(u32_at(bytes, 84)),
            _ => return Err(Bad::Contents),
        };
        let mut header = Header::new(
            Identity(field(bytes, 24)),
            u64_at(bytes, 40),
            u32_at(bytes, 48),
            field(bytes, 64),
            if maps <= MAPS_MAX { maps } else { return Err(Bad::Contents) },
            Tag::default(),
        );
        header.sequence = u64_at(bytes, 16);
        header.next_generation = u64_at(bytes, 56);
        header.clean = clean;
        header.in_flight = u64_at(bytes, IN_FLIGHT_OFFSET);
        header.logged = u32_at(bytes, LOGGED_OFFSET) != 0;
        if !header.in_flight.is_multiple_of(CHUNK_WORDS) || header.in_flight > IN_FLIGHT_MAX {
            return Err(Bad::Contents);
        }
        let mut banks = 0;
        for index in 0..maps {
            let offset = ENTRIES_OFFSET + index * ENTRY_BYTES;
            let entry = Entry {
                bank: u32_at(bytes, offset),
                present: u32_at(bytes, offset + 4) != 0,
                generation: u64_at(bytes, offset + 8),
                tag: Tag { id: field(bytes, offset + 16), number: u64_at(bytes, offset + 32) },
            };
            let generation_fits = (1..header.next_generation).contains(&entry.generation);
            if entry.bank as usize >= maps || !generation_fits {
                return Err(Bad::Contents);
            }
            banks |= 1 << entry.bank;
            header.entries[index] = entry;
        }
        let room_for_generations = header.next_generation < u64::MAX >> 1;
        if maps == 0 || banks != (1_u32 << maps) - 1 || !room_for_generations {
            return Err(Bad::Contents);
        }
        Ok(header)
    }
}

/// A field at an offset that the layout fixes, and so inside the header.
fn field<const N: usize>(bytes: &[u8; HEADER_BYTES], offset: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[offset..offset + N]);
    field
}

fn u32_at(bytes: &[u8; HEADER_BYTES], offset: usize) -> u32 {
    u32::from_le_bytes(field(bytes, offset))
}

fn u64_at(bytes: &[u8; HEADER_BYTES], offset: usize) -> u64 {
    u64::from_le_bytes(field(bytes, offset))
}
