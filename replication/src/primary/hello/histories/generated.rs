use proptest::prelude::*;

use super::*;

fn until() -> impl Strategy<Value = Until> {
    prop_oneof![
        1 => Just(Until::Ranges),
        1 => Just(Until::Intent),
        1 => Just(Until::Line),
        1 => Just(Until::Started),
        1 => Just(Until::Attached),
        1 => (0..CELLS).prop_map(Until::Copied),
        1 => Just(Until::Cut),
        1 => Just(Until::Committed),
        4 => Just(Until::Told),
    ]
}

/// What happens without anybody's doing.
fn accident() -> impl Strategy<Value = Op> {
    let (node, cell) = (0..2_usize, 0..CELLS);
    prop_oneof![
        3 => (node.clone(), cell.clone()).prop_map(|(n, c)| Op::Write(n, c)),
        1 => cell.prop_map(Op::LastWrite),
        4 => until().prop_map(|until| Op::Hello { resync: false, until }),
        2 => until().prop_map(Op::Checkpoint),
        1 => Just(Op::LoseLink),
        2 => node.clone().prop_map(Op::Restart),
        1 => (node, any::<u8>()).prop_map(|(n, lost)| Op::LosePower(n, lost, None)),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let (node, cell) = (0..2_usize, 0..CELLS);
    let role = prop_oneof![Just(Role::Primary), Just(Role::Secondary)];
    let other = prop::option::of(role.clone());
    prop_oneof![
        4 => (node.clone(), cell.clone()).prop_map(|(n, c)| Op::Write(n, c)),
        1 => cell.prop_map(Op::LastWrite),
        8 => (prop::bool::weighted(0.1), until()).prop_map(|(resync, until)| Op::Hello { resync, until }),
        2 => until().prop_map(Op::Checkpoint),
        1 => Just(Op::LoseLink),
        1 => node.clone().prop_map(Op::Stop),
        3 => node.clone().prop_map(Op::Restart),
        3 => (node.clone(), role, prop::bool::weighted(0.2))
            .prop_map(|(n, r, d)| Op::Start(n, r, d)),
        1 => node.clone().prop_map(Op::Failover),
        1 => node.clone().prop_map(Op::Discard),
        1 => node.clone().prop_map(Op::ForceLonely),
        1 => node.clone().prop_map(Op::LoseMaps),
        2 => node.clone().prop_map(Op::KeepCopy),
        2 => (node.clone(), 0..3_usize).prop_map(|(n, c)| Op::PutBack(n, c)),
        2 => (node, any::<u8>(), other).prop_map(|(n, lost, r)| Op::LosePower(n, lost, r)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 400,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn no_history_leads_to_a_copy_that_leaves_a_difference_or_loses_a_write_without_consent(
        ops in prop::collection::vec(op(), 1..80),
        winner in 0..2_usize,
    ) {
        let mut world = World::new();
        world.apply(Op::Hello { resync: false, until: Until::Told });
        for op in ops {
            world.apply(op);
        }
        world.heal(winner);
    }

    #[test]
    fn after_accidents_alone_the_sides_come_together_by_themselves(
        ops in prop::collection::vec(accident(), 1..60),
    ) {
        let mut world = World::new();
        for op in ops {
            world.apply(op);
        }
        world.lose_link();
        world.hello(0, false, Until::Told);
        prop_assert_eq!(world.session, Some(0), "refused");
    }
}
