//! Everything that the fuzzer found worth keeping, once more.

use std::path::Path;

#[test]
fn every_input_of_the_corpus_passes() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (name, target) in brep_fuzz::TARGETS {
        let mut inputs = 0;
        for entry in std::fs::read_dir(corpus.join(name)).unwrap() {
            let path = entry.unwrap().path();
            let input = std::fs::read(&path).unwrap();
            if std::panic::catch_unwind(|| target(&input)).is_err() {
                panic!("{} fails: {}", name, path.display());
            }
            inputs += 1;
        }
        assert!(inputs > 0, "{name} has no corpus");
    }
}
