//! The rules of [`BlockDevice`], as checks that any device can be put through.
//!
//! ```
//! use brep_block::{Memory, conformance};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() {
//! let make = async |size| Memory::new("disk", size);
//! conformance::run(make, conformance::Options::default()).await.unwrap();
//! # }
//! ```

mod concurrent;
mod model;
mod range;
mod rules;
mod space;

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

use crate::{BlockDevice, Error, ErrorKind, FlushLevel, WriteFlags, ZeroFlags};

/// What the device under test can do beyond what every device must, and how hard to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// Devices are made in sizes that are multiples of this many bytes.
    pub size_unit: u64,
    /// A device that was just made reads as zeroes.
    pub fresh_is_zero: bool,
    /// [`truncate`](BlockDevice::truncate) works.
    pub can_truncate: bool,
    /// Operations in the random comparison with a model.
    pub operations: u32,
    /// Where its random numbers start. The same seed gives the same operations.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            size_unit: 1,
            fresh_is_zero: true,
            can_truncate: false,
            operations: 600,
            seed: 0x9E37_79B9,
        }
    }
}

impl Options {
    /// Devices are made in sizes that are multiples of this many bytes.
    #[must_use]
    pub fn size_unit(mut self, size_unit: u64) -> Self {
        self.size_unit = size_unit;
        self
    }

    /// A device that was just made reads as anything.
    #[must_use]
    pub fn fresh_is_not_zero(mut self) -> Self {
        self.fresh_is_zero = false;
        self
    }

    /// [`truncate`](BlockDevice::truncate) works.
    #[must_use]
    pub fn can_truncate(mut self) -> Self {
        self.can_truncate = true;
        self
    }

    /// Operations in the random comparison with a model.
    #[must_use]
    pub fn operations(mut self, operations: u32) -> Self {
        self.operations = operations;
        self
    }

    /// Where its random numbers start.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }
}

/// The rule that a device breaks, and how.
pub struct Failure {
    check: &'static str,
    detail: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.check, self.detail)
    }
}

/// As [`fmt::Display`], because this is what a failed test prints.
impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl std::error::Error for Failure {}

/// What a check answers; the text says what went wrong.
type Outcome<T = ()> = std::result::Result<T, String>;

/// Fails the check with a text unless a condition holds.
macro_rules! ensure {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err(format!($($text)+));
        }
    };
}
use ensure;

/// A shared device, of one type or of any.
pub trait IntoDevice {
    /// The device as one of any type.
    fn into_device(self) -> Arc<dyn BlockDevice>;
}

impl<D: BlockDevice + 'static> IntoDevice for Arc<D> {
    fn into_device(self) -> Arc<dyn BlockDevice> {
        self
    }
}

impl IntoDevice for Arc<dyn BlockDevice> {
    fn into_device(self) -> Arc<dyn BlockDevice> {
        self
    }
}

/// Puts a device through every rule that applies to it. Needs a tokio runtime.
///
/// `make` gives a fresh device of the size asked for; it is called many times, and earlier
/// devices may still be open then. A device that calls itself read-only is checked for refusing
/// changes and for ranges only.
///
/// # Errors
/// The first rule that the device breaks.
pub async fn run<D: IntoDevice>(
    make: impl AsyncFn(u64) -> D,
    options: Options,
) -> Result<(), Failure> {
    let make = async |size| make(size).await.into_device();
    let subject = Subject { make, options };
    macro_rules! check {
        ($($module:ident :: $check:ident),+ $(,)?) => {$(
            if let Err(detail) = $module::$check(&subject).await {
                return Err(Failure { check: stringify!($check), detail });
            }
        )+};
    }
    check!(rules::limits_are_sane, range::reads_beyond_the_end_fail);
    if subject.device(4096).await?.limits().read_only {
        check!(rules::a_read_only_device_refuses_changes);
        return Ok(());
    }
    check!(
        rules::a_fresh_device_reads_as_zeroes,
        rules::what_was_written_is_read,
        rules::misaligned_memory_is_written,
        rules::durable_writes_are_read,
        rules::a_flush_of_either_level_succeeds,
        rules::a_zero_length_does_nothing,
        rules::misaligned_requests_fail_and_change_nothing,
        rules::transfers_that_are_too_long_fail,
        range::changes_beyond_the_end_fail_and_change_nothing,
        range::a_growable_device_grows,
        range::a_shorter_device_forgets_what_it_lost,
        space::zeroes_of_every_kind_read_as_zeroes,
        space::discarded_ranges_read_as_before_or_zero,
        space::the_block_status_is_true,
        concurrent::disjoint_writes_do_not_disturb_each_other,
        concurrent::dropped_operations_stay_within_their_range,
        concurrent::flushes_and_writes_at_the_same_time_end,
        model::random_operations_agree_with_the_model,
    );
    Ok(())
}

/// The device under test.
struct Subject<M> {
    make: M,
    options: Options,
}

impl From<String> for Failure {
    fn from(detail: String) -> Self {
        Failure { check: "making a device", detail }
    }
}

impl<M: AsyncFn(u64) -> Arc<dyn BlockDevice>> Subject<M> {
    /// A fresh device of about `size` bytes.
    async fn device(&self, size: u64) -> Outcome<Arc<dyn BlockDevice>> {
        let size = size.next_multiple_of(self.options.size_unit.max(1));
        let device = (self.make)(size).await;
        ensure!(device.size() == size, "asked for {size} bytes, got {}", device.size());
        Ok(device)
    }

    /// A fresh device that was filled with [`pattern`].
    async fn filled(&self, size: u64, seed: u64) -> Outcome<(Arc<dyn BlockDevice>, Vec<u8>)> {
        let device = self.device(size).await?;
        let content = pattern(seed, device.size() as usize);
        write(&*device, 0, &content).await?;
        Ok((device, content))
    }
}

/// Random numbers that are the same everywhere (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// At least 0 and less than `bound`.
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    fn flag(&mut self) -> bool {
        self.below(2) == 1
    }
}

/// Bytes that differ from place to place and from seed to seed, and are never zero.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random(seed);
    let mut data = Vec::with_capacity(len + 8);
    while data.len() < len {
        // The lowest bit of every byte is set.
        data.extend_from_slice(&(random.next() | 0x0101_0101_0101_0101).to_le_bytes());
    }
    data.truncate(len);
    data
}

async fn write(device: &dyn BlockDevice, offset: u64, data: &[u8]) -> Outcome {
    write_flags(device, offset, data, WriteFlags::default()).await
}

/// Writes in pieces that the device takes.
async fn write_flags(
    device: &dyn BlockDevice,
    offset: u64,
    data: &[u8],
    flags: WriteFlags,
) -> Outcome {
    let mut at = offset;
    for piece in data.chunks(device.limits().transfer_max.max(1) as usize) {
        device
            .write(at, Bytes::copy_from_slice(piece), flags)
            .await
            .map_err(|error| format!("a write failed: {error}"))?;
        at += piece.len() as u64;
    }
    Ok(())
}

async fn read(device: &dyn BlockDevice, offset: u64, len: usize) -> Outcome<Vec<u8>> {
    let mut data = Vec::with_capacity(len);
    while data.len() < len {
        let piece = (len - data.len()).min(device.limits().transfer_max.max(1) as usize);
        let read = device
            .read(offset + data.len() as u64, piece)
            .await
            .map_err(|error| format!("a read failed: {error}"))?;
        ensure!(read.len() == piece, "a read of {piece} bytes gave {}", read.len());
        data.extend_from_slice(&read);
    }
    Ok(data)
}

async fn zero(device: &dyn BlockDevice, offset: u64, len: u64, flags: ZeroFlags) -> Outcome {
    let result = device.write_zeroes(offset, len, flags).await;
    result.map_err(|error| format!("write zeroes ({flags:?}) failed: {error}"))
}

async fn flush(device: &dyn BlockDevice, level: FlushLevel) -> Outcome {
    device.flush(level).await.map_err(|error| format!("a flush ({level:?}) failed: {error}"))
}

/// The whole content is as expected, and says where it is not.
async fn expect_content(device: &dyn BlockDevice, expected: &[u8], after: &str) -> Outcome {
    let size = device.size();
    ensure!(
        size == expected.len() as u64,
        "after {after} the size is {size}, not {}",
        expected.len()
    );
    expect_range(device, 0, expected, after).await
}

async fn expect_range(
    device: &dyn BlockDevice,
    offset: u64,
    expected: &[u8],
    after: &str,
) -> Outcome {
    let found = read(device, offset, expected.len()).await?;
    if found == expected {
        return Ok(());
    }
    match found.iter().zip(expected).position(|(found, expected)| found != expected) {
        None => Ok(()),
        Some(at) => Err(format!(
            "after {after} the byte at {} is {:#04x}, not {:#04x}",
            offset + at as u64,
            found[at],
            expected[at],
        )),
    }
}

/// A request that must fail, and in which way.
fn expect_error<T>(result: crate::Result<T>, kind: ErrorKind, what: &str) -> Outcome {
    let Err(error) = result else { return Err(format!("{what} succeeded")) };
    ensure!(error.kind() == kind, "{what} failed with {:?}, not {kind:?}: {error}", error.kind());
    check_error(&error, what)
}

/// What every error must say.
fn check_error(error: &Error, what: &str) -> Outcome {
    ensure!(error.errno() > 0, "{what} failed without an error number: {error}");
    ensure!(!error.node().is_empty(), "{what} failed without the device's name: {error}");
    Ok(())
}

/// The unit in which the device takes reads and writes, in bytes.
fn block_size(device: &dyn BlockDevice) -> u64 {
    device.limits().block_size.max(1).into()
}
