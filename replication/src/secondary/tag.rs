use bytes::Bytes;

use crate::SetId;

/// The qcow2 header extension that carries a buffer's tag.
///
/// | offset | size | field |
/// |---|---|---|
/// | 0 | 4 | version, 1 |
/// | 4 | 4 | 1: in use, 0: retired |
/// | 8 | 8 | sequence number |
/// | 16 | 16 | identity of the set |
/// | 32 | 64 | name of the disk, padded with zero bytes |
pub(crate) const TAG_EXTENSION: u32 = 0x4252_4550;
const TAG_VERSION: u32 = 1;
const TAG_LEN: usize = 96;
const NAME_LEN_MAX: usize = 64;

/// What a buffer says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tag {
    pub(super) in_use: bool,
    pub(super) seq: u64,
    pub(super) set: SetId,
    pub(super) disk: String,
}

impl Tag {
    /// A tag of a buffer that nobody needs any more.
    pub(super) fn retired(disk: &str, seq: u64) -> Self {
        Tag { in_use: false, seq, set: SetId(uuid::Uuid::nil()), disk: disk.to_owned() }
    }

    pub(super) fn encode(&self) -> Bytes {
        let mut out = Vec::with_capacity(TAG_LEN);
        out.extend_from_slice(&TAG_VERSION.to_be_bytes());
        out.extend_from_slice(&u32::from(self.in_use).to_be_bytes());
        out.extend_from_slice(&self.seq.to_be_bytes());
        out.extend_from_slice(self.set.0.as_bytes());
        out.extend_from_slice(
            self.disk.as_bytes().get(..NAME_LEN_MAX).unwrap_or(self.disk.as_bytes()),
        );
        out.resize(TAG_LEN, 0);
        out.into()
    }

    pub(super) fn decode(data: &[u8]) -> Option<Self> {
        let data: &[u8; TAG_LEN] = data.try_into().ok()?;
        let (version, rest) = data.split_first_chunk::<4>()?;
        let (in_use, rest) = rest.split_first_chunk::<4>()?;
        let (seq, rest) = rest.split_first_chunk::<8>()?;
        let (set, name) = rest.split_first_chunk::<16>()?;
        if u32::from_be_bytes(*version) != TAG_VERSION {
            return None;
        }
        let name = name.split(|b| *b == 0).next()?;
        Some(Tag {
            in_use: u32::from_be_bytes(*in_use) == 1,
            seq: u64::from_be_bytes(*seq),
            set: SetId(uuid::Uuid::from_bytes(*set)),
            disk: std::str::from_utf8(name).ok()?.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_read_back_and_damage_is_noticed() {
        let tag = Tag { in_use: true, seq: 42, set: SetId::random(), disk: "vda".into() };
        let data = tag.encode();
        assert_eq!(Tag::decode(&data), Some(tag));
        assert_eq!(Tag::decode(&data[1..]), None);
        let mut newer = data.to_vec();
        newer[3] = 2;
        assert_eq!(Tag::decode(&newer), None);
    }
}
