//! The rows of the table of options, as command lines write them (spec: quorum, options;
//! series v3, section 3).

use brep_quorum::option_text::{ChildSource, ChildText, QuorumText};
use brep_quorum::{QuorumError, ReadPattern};
use proptest::prelude::*;

/// `a=b,c=d`
fn parse(line: &str) -> Result<QuorumText, QuorumError> {
    let pairs: Vec<_> = line.split(',').filter_map(|pair| pair.split_once('=')).collect();
    QuorumText::parse(&pairs)
}

fn refused(line: &str) -> String {
    parse(line).unwrap_err().to_string()
}

fn owned(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

const TWO: &str = "vote-threshold=1,children.0=a,children.1=b";

#[test]
fn children_with_a_hole_or_no_numbers_are_no_array() {
    for line in [
        "children.0=a,children.2=c",
        "children.1=b",
        "children=a",
        "children.=a",
        "children.x=a",
        "children.0=a,children.x.driver=raw",
        "children.00=a",
        "children.0=a,children.01=b",
        "children.+0=a",
        "children.-1=a",
        "children.0.=a",
        "children..driver=a",
        "children.99999999999999999999999=a",
        "children.18446744073709551615=a",
    ] {
        let line = format!("vote-threshold=1,{line}");
        assert_eq!(refused(&line), "Option children is not a valid array", "{line}");
    }
    parse("vote-threshold=1,children.1=b,children.0=a").expect("the order does not matter");
}

#[test]
fn no_children_are_refused() {
    assert_eq!(refused("vote-threshold=1"), "Number of provided children must be 1 or more");
    assert_eq!(refused("childrens.0=a"), "Number of provided children must be 1 or more");
}

#[test]
fn one_child_is_accepted() {
    assert_eq!(parse("vote-threshold=1,children.0=a").unwrap().children.len(), 1);
}

#[test]
fn the_threshold_is_between_1_and_the_children() {
    let low = "parameter 'vote-threshold' expects a value >= 1";
    let high = "threshold may not exceed children count";
    let not_a_number = "parameter 'vote-threshold' expects a number";
    let children = "children.0=a,children.1=b";
    for (value, text, errno) in [
        ("0", low, 34),
        ("-1", low, 34),
        ("-99999999999999999999", low, 34),
        ("3", high, 34),
        ("99999999999999999999", high, 34),
        ("two", not_a_number, 22),
        ("", not_a_number, 22),
        ("-", not_a_number, 22),
        ("+1", not_a_number, 22),
    ] {
        let error = parse(&format!("vote-threshold={value},{children}")).unwrap_err();
        assert_eq!((error.to_string().as_str(), error.errno()), (text, errno), "{value:?}");
    }
    assert_eq!(parse(&format!("vote-threshold=2,{children}")).unwrap().settings.vote_threshold, 2);
    assert_eq!(refused(children), low, "it has to be given");
}

/// Series v3, section 3: the original let a fifo quorum's threshold be 0, the default.
#[test]
fn a_fifo_needs_no_threshold_and_it_is_1_then() {
    let text = parse("read-pattern=fifo,children.0=a,children.1=b").unwrap();
    assert_eq!(text.settings.vote_threshold, 1);
    for value in ["0", "3"] {
        let line = format!("read-pattern=fifo,vote-threshold={value},children.0=a,children.1=b");
        assert_eq!(parse(&line).unwrap_err().errno(), 34);
    }
}

#[test]
fn a_read_pattern_is_fifo_or_quorum() {
    assert_eq!(parse(TWO).unwrap().settings.read_pattern, ReadPattern::Quorum);
    for (value, pattern) in [("fifo", ReadPattern::Fifo), ("quorum", ReadPattern::Quorum)] {
        let text = parse(&format!("{TWO},read-pattern={value}")).unwrap();
        assert_eq!(text.settings.read_pattern, pattern);
    }
    for value in ["lifo", "Fifo", ""] {
        let text = refused(&format!("{TWO},read-pattern={value}"));
        assert_eq!(text, "Please set read-pattern as fifo or quorum");
    }
}

#[test]
fn blkverify_wants_two_children_threshold_2_and_no_rewriting() {
    let verify = |rest: &str| parse(&format!("blkverify=on,children.0=a,children.1=b,{rest}"));
    assert!(verify("vote-threshold=2").unwrap().settings.blkverify);
    for rest in ["vote-threshold=1", "vote-threshold=2,children.2=c"] {
        let text = verify(rest).unwrap_err().to_string();
        assert_eq!(text, "blkverify needs exactly 2 children and a vote-threshold of 2");
    }
    let text = verify("vote-threshold=2,rewrite-corrupted=on").unwrap_err().to_string();
    assert_eq!(text, "rewrite-corrupted cannot be used together with blkverify");
    verify("vote-threshold=1,rewrite-corrupted=on,read-pattern=fifo").expect("without effect");
    verify("vote-threshold=2,rewrite-corrupted=off").unwrap();
}

#[test]
fn a_switch_is_on_or_off() {
    let text = parse(&format!("{TWO},rewrite-corrupted=on,blkverify=off")).unwrap();
    assert!(text.settings.rewrite_corrupted && !text.settings.blkverify);
    for name in ["blkverify", "rewrite-corrupted"] {
        let text = refused(&format!("{TWO},{name}=maybe"));
        assert_eq!(text, format!("parameter '{name}' expects 'on' or 'off'"));
    }
    let text = refused("vote-threshold=1,children.0.file=a,children.0.ignore-errors=1");
    assert_eq!(text, "parameter 'ignore-errors' expects 'on' or 'off'");
}

#[test]
fn children_are_named_or_described_and_both_kinds_mix() {
    let text = parse(
        "driver=quorum,if=none,children.1.file.driver=nbd+colo,read-pattern=fifo,\
         children.0=disk0,children.1.file.host=H,children.1.driver=raw,\
         children.1.ignore-errors=on,id=colo1",
    )
    .unwrap();
    let options = [("file.driver", "nbd+colo"), ("file.host", "H"), ("driver", "raw")];
    assert_eq!(
        text.children,
        [
            ChildText { source: ChildSource::Reference("disk0".into()), ignore_errors: false },
            ChildText { source: ChildSource::Inline(owned(&options)), ignore_errors: true },
        ]
    );
    assert_eq!(text.rest, owned(&[("driver", "quorum"), ("if", "none"), ("id", "colo1")]));
}

/// Series v3, section 3: the option exists only for children given as option groups.
#[test]
fn errors_of_a_child_given_by_reference_cannot_be_ignored() {
    let wanted = "children.1 is the name of a node, which takes no further options: \
                  drop the name or them";
    for option in ["children.1.ignore-errors=on", "children.1.driver=raw"] {
        let error = parse(&format!("{TWO},{option}")).unwrap_err();
        assert_eq!((error.to_string().as_str(), error.errno()), (wanted, 22));
    }
}

/// Series v3, section 3: what the child does not know is refused by whoever opens it.
#[test]
fn options_of_a_child_are_handed_on_unread() {
    let text = parse("vote-threshold=1,children.0.no-such=x,children.0.children.0=y").unwrap();
    let options = owned(&[("no-such", "x"), ("children.0", "y")]);
    assert_eq!(text.children[0].source, ChildSource::Inline(options));
}

#[test]
fn the_last_of_two_values_holds() {
    let text = parse(&format!("{TWO},vote-threshold=2,children.1=c")).unwrap();
    assert_eq!(text.settings.vote_threshold, 2);
    assert_eq!(text.children[1].source, ChildSource::Reference("c".into()));
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(
        pairs in prop::collection::vec(("(children\\.)?.{0,12}", ".{0,8}"), 0..8)
    ) {
        let _ = QuorumText::parse(&pairs);
    }

    /// Whatever is accepted keeps the rules, and nothing of it is lost.
    #[test]
    fn what_is_accepted_is_a_quorum_that_can_be_made(
        pairs in prop::collection::vec(
            (
                "(children(\\.[0-2])?(\\.(driver|ignore-errors|file\\.host|))?|\
                  vote-threshold|read-pattern|blkverify|rewrite-corrupted|id)",
                "(|on|off|fifo|quorum|-?[0-3]|disk)",
            ),
            0..8,
        )
    ) {
        if let Ok(text) = QuorumText::parse(&pairs) {
            prop_assert!(text.settings.check(text.children.len()).is_ok());
            let described = text.children.iter().map(|child| match &child.source {
                ChildSource::Inline(options) => options.len(),
                ChildSource::Reference(_) => 0,
            });
            let kept = text.rest.len() + described.sum::<usize>();
            let other = |(key, _): &&(String, String)| {
                key == "id" || key.ends_with(".driver") || key.ends_with(".host")
            };
            prop_assert_eq!(kept, pairs.iter().filter(other).count());
        }
    }
}
