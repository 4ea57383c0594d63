//! Random requests against a model, with the image opened again in between.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;

use brep_block::{BlockDevice, Memory, WriteFlags};
use brep_qcow2::{CheckMode, CreateOptions, MakeEmpty, OpenOptions, check};
use common::{Op, Rng, memory, open_with, pattern, read_all};
use proptest::prelude::*;

const SIZE: u64 = 512 << 10;

#[derive(Debug, Clone)]
enum Step {
    Ops(u64, u8),
    Reopen { clean: bool },
    Empty { keep: bool },
    Release,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        5 => (any::<u64>(), 1u8..12).prop_map(|(seed, count)| Step::Ops(seed, count)),
        2 => any::<bool>().prop_map(|clean| Step::Reopen { clean }),
        1 => any::<bool>().prop_map(|keep| Step::Empty { keep }),
        1 => Just(Step::Release),
    ];
    prop::collection::vec(step, 1..12)
}

fn images() -> impl Strategy<Value = CreateOptions> {
    (9u32..=17, 0u32..=6, any::<bool>()).prop_map(|(cluster_bits, refcount_order, extended)| {
        let extended_l2 = extended && cluster_bits >= 14;
        CreateOptions { cluster_bits, refcount_order, extended_l2, ..CreateOptions::new(SIZE) }
    })
}

async fn agrees(create: CreateOptions, ordered: bool, steps: Vec<Step>) {
    let file = memory();
    common::create(&file, &create).await;
    let mut base = pattern(5, SIZE as usize - 70_001);
    let backing: Arc<dyn BlockDevice> = Memory::new("backing", base.len() as u64);
    backing.write(0, base.clone().into(), WriteFlags::default()).await.unwrap();
    base.resize(SIZE as usize, 0);
    let options = OpenOptions { ordered, ..common::over(&backing) };
    let mut disk = open_with(&file, options.clone()).await;
    let mut model = base.clone();
    let mut killed = false;
    for step in steps {
        match step {
            Step::Ops(seed, count) => {
                let mut rng = Rng::new(seed);
                for _ in 0..count {
                    let op = Op::random(&mut rng, SIZE);
                    op.apply(&*disk).await.unwrap();
                    op.model(&mut model, &*disk).await;
                }
            }
            Step::Reopen { clean } => {
                if clean {
                    disk.close().await.unwrap();
                }
                killed |= !clean;
                drop(disk);
                let report = check(&file, CheckMode::Report).await.unwrap();
                assert!(report.corruptions == 0 && (killed || report.is_clean()), "{report:?}");
                disk = open_with(&file, options.clone()).await;
            }
            Step::Empty { keep } => {
                let how = if keep { MakeEmpty::Keep } else { MakeEmpty::Release };
                disk.make_empty(how).await.unwrap();
                model.clone_from(&base);
            }
            Step::Release => while disk.release_space(0).await.unwrap() > 0 {},
        }
        assert!(read_all(&*disk).await == model);
        let mut at = 0;
        while let Some(range) = disk.next_allocated(at).await.unwrap() {
            assert!(range.start >= at && range.end > range.start && range.end <= SIZE);
            let hole = at as usize..range.start as usize;
            assert!(model[hole.clone()] == base[hole], "not allocated, but changed");
            at = range.end;
        }
        assert!(model[at as usize..] == base[at as usize..], "not allocated, but changed");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn the_disk_is_its_model(create in images(), ordered: bool, steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(agrees(create, ordered, steps));
    }
}
