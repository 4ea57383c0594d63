//! Every device of this crate obeys the rules of the trait.

use std::cell::Cell;
use std::sync::Arc;

use brep_block::conformance::{self, Options};
use brep_block::{
    BlockDevice, CacheMode, Count, Error, ErrorKind, Fault, Memory, Part, RawFile, RawFileOptions,
    ReadOnly, Serialise,
};
use tempfile::TempDir;

/// Makes files in a directory of their own.
struct Files {
    dir: TempDir,
    made: Cell<u32>,
    options: RawFileOptions,
}

impl Files {
    fn new(options: RawFileOptions) -> Self {
        Files { dir: tempfile::tempdir().unwrap(), made: Cell::new(0), options }
    }

    fn make(&self, size: u64) -> Result<Arc<RawFile>, Error> {
        self.made.set(self.made.get() + 1);
        let path = self.dir.path().join(format!("disk{}.raw", self.made.get()));
        RawFile::open(path, RawFileOptions { create: Some(size), ..self.options.clone() })
    }
}

fn uncached() -> RawFileOptions {
    RawFileOptions { cache: CacheMode::None, ..RawFileOptions::default() }
}

/// Says so where the file system has no direct I/O.
fn direct_io_is_missing(test: &str) -> bool {
    let missing = Files::new(uncached()).make(4096).err();
    let missing = missing.filter(|error| error.kind() == ErrorKind::Unsupported);
    missing.is_some_and(|error| {
        eprintln!("SKIP: {test}: {error}");
        true
    })
}

#[tokio::test]
async fn memory() {
    let make = async |size| Memory::new("memory", size) as Arc<dyn BlockDevice>;
    conformance::run(make, Options::default().can_truncate()).await.unwrap();
}

#[tokio::test]
async fn growable_memory() {
    let make = async |size| Memory::new_growable("memory", size);
    conformance::run(make, Options::default().can_truncate()).await.unwrap();
}

#[tokio::test]
async fn a_file_through_the_page_cache() {
    let files = Files::new(RawFileOptions::default());
    let make = async |size| files.make(size).unwrap();
    conformance::run(make, Options::default().can_truncate()).await.unwrap();
}

#[tokio::test]
async fn a_growable_file_through_the_page_cache() {
    let files = Files::new(RawFileOptions { growable: true, ..RawFileOptions::default() });
    let make = async |size| files.make(size).unwrap();
    conformance::run(make, Options::default().can_truncate()).await.unwrap();
}

#[tokio::test]
async fn a_file_past_the_page_cache() {
    if direct_io_is_missing("a_file_past_the_page_cache") {
        return;
    }
    let files = Files::new(uncached());
    let make = async |size| files.make(size).unwrap();
    conformance::run(make, Options::default().can_truncate()).await.unwrap();
}

#[tokio::test]
async fn a_growable_file_past_the_page_cache() {
    if direct_io_is_missing("a_growable_file_past_the_page_cache") {
        return;
    }
    let files = Files::new(RawFileOptions { growable: true, ..uncached() });
    let make = async |size| files.make(size).unwrap();
    conformance::run(make, Options::default().can_truncate()).await.unwrap();
}

#[tokio::test]
async fn decorators_without_rules() {
    let options = Options::default().can_truncate();
    let make = async |size| Count::new(Memory::new("counted", size));
    conformance::run(make, options).await.unwrap();
    let make = async |size| Fault::new(Memory::new("without faults", size));
    conformance::run(make, options).await.unwrap();
    let make = async |size| Serialise::new(Memory::new("serialised", size));
    conformance::run(make, options).await.unwrap();
    let make = async |size| ReadOnly::new(Memory::new("read-only", size));
    conformance::run(make, options).await.unwrap();
}

#[tokio::test]
async fn serialised_files() {
    let files = Files::new(RawFileOptions::default());
    let make = async |size| Serialise::new(files.make(size).unwrap());
    conformance::run(make, Options::default().can_truncate()).await.unwrap();
}

#[tokio::test]
async fn a_part_of_a_device() {
    let make = async |size| Part::new(Memory::new("memory", size + 9000), 4096, size).unwrap();
    conformance::run(make, Options::default()).await.unwrap();
}
