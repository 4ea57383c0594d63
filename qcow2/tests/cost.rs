//! What requests cost in operations on the file.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;

use brep_block::{BlockDevice, Count, Io, Memory, Operation, WriteFlags};
use brep_qcow2::{CreateOptions, MakeEmpty, OpenOptions, Qcow2};
use bytes::Bytes;
use common::{create, memory, open_with};

const SIZE: u64 = 256 << 20;

struct Buffer {
    count: Arc<Count>,
    disk: Arc<Qcow2>,
}

impl Buffer {
    async fn new(ordered: bool) -> Buffer {
        let file = memory();
        create(&file, &CreateOptions::buffer(SIZE)).await;
        let count = Count::new(file);
        let backing: Arc<dyn BlockDevice> = Memory::new("backing", SIZE);
        let options = OpenOptions { ordered, ..common::over(&backing) };
        let disk = open_with(&(count.clone() as Arc<dyn BlockDevice>), options).await;
        Buffer { count, disk }
    }

    fn writes(&self) -> u64 {
        self.count.of(Operation::Write).operations
    }

    /// Writes in another order than ascending.
    async fn epoch(&self) {
        for i in 0..1024u64 {
            let offset = (i * 389 % 1024) * 65536 + 8192;
            let io = self.disk.write(offset, Bytes::from(vec![1; 4096]), WriteFlags::default());
            assert!(matches!(io, Io::Ready(Ok(()))), "an inline file makes an inline write");
        }
    }
}

#[tokio::test]
async fn a_small_write_to_a_new_cluster_costs_two_writes() {
    let buffer = Buffer::new(false).await;
    buffer.epoch().await;
    // One for the data, one for the mapping; refcounts for many clusters at a time.
    let extra = buffer.writes() - 2 * 1024;
    assert!(extra < 24, "{extra} writes of refcounts and tables");
    assert_eq!(buffer.count.of(Operation::Flush).operations, 0);
    let before = buffer.writes();
    buffer.epoch().await;
    assert_eq!(buffer.writes() - before, 1024, "in place, only data is written");
}

#[tokio::test]
async fn an_ordered_image_is_flushed_once_for_many_new_clusters() {
    let buffer = Buffer::new(true).await;
    buffer.epoch().await;
    let flushes = buffer.count.of(Operation::Flush).operations;
    assert!(flushes < 24, "{flushes} flushes");
}

#[tokio::test]
async fn emptying_costs_what_was_used_and_keeps_the_space() {
    let buffer = Buffer::new(false).await;
    buffer.epoch().await;
    let size = buffer.count.size();
    let before = buffer.writes();
    buffer.disk.make_empty(MakeEmpty::Keep).await.unwrap();
    assert!(buffer.writes() - before <= 8, "{} writes", buffer.writes() - before);
    for _ in 0..5 {
        buffer.epoch().await;
        buffer.disk.make_empty(MakeEmpty::Keep).await.unwrap();
    }
    assert!(buffer.count.size() <= size + (2 << 20), "the space is not used again");
    let before = buffer.writes();
    buffer.disk.make_empty(MakeEmpty::Keep).await.unwrap();
    assert_eq!(buffer.writes(), before, "an empty image is left alone");
}

#[tokio::test]
async fn a_large_write_is_one_write_of_data() {
    let buffer = Buffer::new(false).await;
    buffer.disk.write(0, Bytes::from(vec![1; 16 << 20]), WriteFlags::default()).await.unwrap();
    buffer.disk.make_empty(MakeEmpty::Keep).await.unwrap();
    let before = buffer.writes();
    let bytes = buffer.count.of(Operation::Write).bytes;
    buffer.disk.write(0, Bytes::from(vec![1; 1 << 20]), WriteFlags::default()).await.unwrap();
    assert!(buffer.writes() - before <= 6, "{} writes", buffer.writes() - before);
    assert!(buffer.count.of(Operation::Write).bytes - bytes < (1 << 20) + (200 << 10));
}

#[tokio::test]
async fn space_is_given_back_down_to_what_is_to_be_kept() {
    let buffer = Buffer::new(false).await;
    buffer.epoch().await;
    buffer.disk.make_empty(MakeEmpty::Keep).await.unwrap();
    let mut released = 0;
    loop {
        let bytes = buffer.disk.release_space(16 << 20).await.unwrap();
        assert!(bytes <= 16 << 20, "one call does a bounded piece");
        if bytes == 0 {
            break;
        }
        released += bytes;
    }
    assert!(released > 40 << 20 && released < 64 << 20, "{released}");
    // The last cluster need not be in the file as a whole.
    let discarded = buffer.count.of(Operation::Discard).bytes;
    assert!(discarded <= released && discarded > released - 65536, "{discarded} of {released}");
    // What was given back can be used again.
    buffer.epoch().await;
    assert_eq!(buffer.disk.allocated_bytes().await.unwrap(), 1024 * 4096);
    buffer.disk.close().await.unwrap();
}
