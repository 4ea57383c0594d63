//! What is copied, how much of it, and when: D21 to D28.

use std::sync::Arc;

use brep_block::{BlockDevice, Operation, Replication, Rule, ZeroFlags};
use brep_qcow2::{OpenOptions, Qcow2};

use crate::support::*;

/// Both sizes at which the cases are checked: as they are written, and scaled to brep's own.
fn setups() -> [Setup; 2] {
    [Setup::new(SIZE), Setup::subclusters(SIZE)]
}

/// 512 bytes across the border of the first two units.
async fn write_over_the_border(s: &S, unit: u64, byte: u8) {
    write(&*s.local(), unit - 256, 512, byte).await.unwrap();
}

fn bytes_read(s: &S) -> u64 {
    s.base.count.of(Operation::Read).bytes
}

/// Row: §10.6.
#[test]
fn d21_write_across_a_border_copies_both_units() {
    run(async {
        for setup in setups() {
            let unit = setup.unit_bytes;
            let s = setup.started().await;
            write_over_the_border(&s, unit, 0x22).await;
            assert_eq!(bytes_read(&s), 2 * unit);
            expect(&*s.node, 0, 4 * unit, 0x11).await;
            expect(&*s.base.inner, unit - 256, 512, 0x22).await;
            let hidden = s.close_and_open_hidden().await;
            assert_eq!(hidden.next_allocated(0).await.unwrap(), Some(0..2 * unit));
            assert_eq!(hidden.allocated_bytes().await.unwrap(), 2 * unit);
            expect(&*hidden, 0, 2 * unit, 0x11).await;
        }
    });
}

#[test]
fn d22_second_write_to_the_same_units_copies_nothing() {
    run(async {
        for setup in setups() {
            let unit = setup.unit_bytes;
            let s = setup.started().await;
            write_over_the_border(&s, unit, 0x22).await;
            let size = s.hidden.inner.size();
            s.hidden.count.reset();
            s.base.count.reset();
            write_over_the_border(&s, unit, 0x44).await;
            assert_eq!((s.hidden.changes(), bytes_read(&s)), (0, 0));
            assert_eq!(s.hidden.inner.size(), size);
            expect(&*s.node, 0, 4 * unit, 0x11).await;
            expect(&*s.base.inner, unit - 256, 512, 0x44).await;
            let hidden = s.close_and_open_hidden().await;
            expect(&*hidden, 0, 2 * unit, 0x11).await;
        }
    });
}

/// Row: §14.34, §14.36.
#[test]
fn d23_checkpoint_makes_units_be_copied_again() {
    run(async {
        for setup in setups() {
            let unit = setup.unit_bytes;
            let s = setup.started().await;
            write_over_the_border(&s, unit, 0x22).await;
            fill(&*s.node, 3 * unit, unit, 0x33).await;
            s.node.checkpoint().await.unwrap();
            // The new checkpoint: what the primary had written, and nothing of the guest's.
            expect(&*s.node, unit - 256, 512, 0x22).await;
            expect(&*s.node, 3 * unit, unit, 0x11).await;
            s.base.count.reset();
            write_over_the_border(&s, unit, 0x44).await;
            assert_eq!(bytes_read(&s), 2 * unit);
            expect(&*s.node, 0, unit - 256, 0x11).await;
            expect(&*s.node, unit - 256, 512, 0x22).await;
            expect(&*s.node, unit + 256, unit, 0x11).await;
            expect(&*s.base.inner, unit - 256, 512, 0x44).await;
            let hidden = s.close_and_open_hidden().await;
            assert_eq!(hidden.allocated_bytes().await.unwrap(), 2 * unit);
            expect(&*hidden, unit - 256, 512, 0x22).await;
            expect(&*hidden, 0, unit - 256, 0x11).await;
        }
    });
}

#[test]
fn d24_primary_write_under_a_guest_write_is_copied_and_not_seen() {
    run(async {
        for setup in setups() {
            let unit = setup.unit_bytes;
            let s = setup.started().await;
            fill(&*s.node, unit, unit, 0x33).await;
            write(&*s.local(), unit, unit, 0x22).await.unwrap();
            expect(&*s.node, unit, unit, 0x33).await;
            expect(&*s.base.inner, unit, unit, 0x22).await;
            let hidden = s.close_and_open_hidden().await;
            expect(&*hidden, unit, unit, 0x11).await;
        }
    });
}

#[test]
fn d25_guest_write_to_half_a_unit_keeps_the_pre_image_of_the_rest() {
    run(async {
        for setup in setups() {
            let unit = setup.unit_bytes;
            let s = setup.started().await;
            write(&*s.local(), unit, unit, 0x22).await.unwrap();
            fill(&*s.node, unit, unit / 2, 0x33).await;
            expect(&*s.node, 0, unit, 0x11).await;
            expect(&*s.node, unit, unit / 2, 0x33).await;
            expect(&*s.node, unit + unit / 2, unit, 0x11).await;
            // Also once it is the disk.
            s.node.stop(true).await.unwrap();
            s.merged().await;
            expect(&*s.base.inner, unit, unit / 2, 0x33).await;
            expect(&*s.base.inner, unit + unit / 2, unit, 0x11).await;
        }
    });
}

#[test]
fn d26_two_writes_to_one_unit_copy_it_once_and_wait_for_the_copy() {
    run(async {
        for setup in setups() {
            let unit = setup.unit_bytes;
            let s = setup.started().await;
            let hang = s.hidden.fault.hang(Rule::new(Operation::Write).forever());
            let writes = [0, 1024].map(|offset| {
                let local = s.local();
                tokio::spawn(async move { write(&*local, unit + offset, 1024, 0x22).await })
            });
            hang.reached(1).await;
            settle().await;
            // The copy hangs: neither write has come through, and the guest sees none.
            assert!(writes.iter().all(|write| !write.is_finished()));
            assert_eq!((s.base.changes(), bytes_read(&s)), (0, unit));
            expect(&*s.base.inner, 0, 4 * unit, 0x11).await;
            hang.release();
            for write in writes {
                write.await.unwrap().unwrap();
            }
            assert_eq!(bytes_read(&s), unit);
            expect(&*s.base.inner, unit, 2048, 0x22).await;
            expect(&*s.node, 0, 4 * unit, 0x11).await;
        }
    });
}

/// Neither before the mapping is in the file: a copy is complete only when it can be found.
#[test]
fn d26_write_waits_for_every_part_of_the_copy() {
    run(async {
        let mut nth = 1;
        loop {
            let s = Setup::subclusters(MIB).started().await;
            let hang = s.hidden.fault.hang(Rule::new(Operation::Write).nth(nth));
            let local = s.local();
            let write = tokio::spawn(async move { write(&*local, 0, 2048, 0x22).await });
            tokio::select! {
                () = hang.reached(1) => {}
                () = async { while !write.is_finished() { tokio::task::yield_now().await } } => break,
            }
            settle().await;
            assert_eq!((write.is_finished(), s.base.changes()), (false, 0), "file write {nth}");
            hang.release();
            write.await.unwrap().unwrap();
            nth += 1;
        }
        assert!(nth > 2, "a copy is at least data and mapping");
    });
}

/// As a restart after a kill would find it at the moment at which the disk is overwritten.
#[test]
fn d26_pre_image_can_be_found_in_the_file_before_the_disk_is_overwritten() {
    run(async {
        for setup in setups() {
            let unit = setup.unit_bytes;
            let s = setup.started().await;
            let hang = s.base.fault.hang(Rule::new(Operation::Write));
            let local = s.local();
            let write = tokio::spawn(async move { write(&*local, unit, 512, 0x22).await });
            hang.reached(1).await;
            let options = OpenOptions { read_only: true, ..OpenOptions::default() };
            let hidden = Qcow2::open(Arc::clone(&s.hidden.inner), options).await.unwrap();
            assert_eq!(hidden.next_allocated(0).await.unwrap(), Some(unit..2 * unit));
            expect(&*hidden, unit, unit, 0x11).await;
            hang.release();
            write.await.unwrap().unwrap();
        }
    });
}

/// Row: §15.6.
#[test]
fn d27_last_partial_unit_is_copied_with_its_own_length() {
    run(async {
        for setup in [Setup::new(MIB + 512), Setup::subclusters(MIB + 512)] {
            let s = setup.started().await;
            write(&*s.local(), MIB, 512, 0x22).await.unwrap();
            assert_eq!(bytes_read(&s), 512);
            expect(&*s.node, 0, MIB + 512, 0x11).await;
            expect(&*s.base.inner, MIB, 512, 0x22).await;
            s.node.stop(true).await.unwrap();
            s.merged().await;
            expect(&*s.base.inner, 0, MIB + 512, 0x11).await;
        }
    });
}

/// Row: §14.6, §14.7.
#[test]
fn d28_discards_and_zeroes_of_the_primary_are_copied_first() {
    run(async {
        for setup in setups() {
            let unit = setup.unit_bytes;
            let s = setup.started().await;
            let local: Arc<dyn BlockDevice> = s.local();
            local.discard(unit, unit).await.unwrap();
            let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
            local.write_zeroes(3 * unit, unit, flags).await.unwrap();
            local.write_zeroes(5 * unit - 100, 200, ZeroFlags::default()).await.unwrap();
            expect(&*s.node, 0, 8 * unit, 0x11).await;
            for (offset, len) in [(unit, unit), (3 * unit, unit), (5 * unit - 100, 200)] {
                expect(&*s.base.inner, offset, len, 0).await;
            }
            // As zeroes, so that both sides are equal.
            assert_eq!(s.base.count.of(Operation::Discard).operations, 0);
            let hang = s.hidden.fault.hang(Rule::new(Operation::Write));
            let changes = s.base.changes();
            let discard = tokio::spawn(async move { local.discard(7 * unit, unit).await });
            hang.reached(1).await;
            settle().await;
            assert_eq!((discard.is_finished(), s.base.changes()), (false, changes));
            hang.release();
            discard.await.unwrap().unwrap();
            expect(&*s.node, 0, 8 * unit, 0x11).await;
        }
    });
}
