//! Meta contexts: what a client asks for, and what there is (§7).

use std::collections::BTreeSet;

use bytes::Bytes;

use super::agreement::{ExportInfo, SelectedContext};
use super::options::{OptionError, inconsistent, string};
use crate::proto::wire::{BASE_ALLOCATION, DIRTY_BITMAP_PREFIX, Reader};

/// `LIST_META_CONTEXT` or `SET_META_CONTEXT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MetaOption {
    pub(super) export: String,
    /// As received; known to be well-formed.
    queries: Bytes,
}

/// What was selected last, and for which export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Selection {
    canonical_name: String,
    contexts: Vec<SelectedContext>,
}

/// Parses the data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
pub(super) fn parse_meta(data: &Bytes) -> Result<MetaOption, OptionError> {
    let mut reader = Reader::new(data);
    let name = reader.bytes_u32().ok_or_else(inconsistent)?;
    let count = reader.u32().ok_or_else(inconsistent)?;
    let queries = data.slice_ref(reader.rest());
    for _ in 0..count {
        // Every round takes at least four bytes, so a lie in `count` ends the loop soon.
        reader.bytes_u32().ok_or_else(inconsistent)?;
    }
    if !reader.is_empty() {
        return Err(inconsistent());
    }
    Ok(MetaOption { export: string(name)?, queries })
}

impl MetaOption {
    /// The contexts that a list shows: all if nothing is asked for; else those that are asked for
    /// by name, namespace, or as the dirty bitmaps. What does not exist is passed over.
    pub(super) fn listed(&self, export: &ExportInfo) -> Vec<SelectedContext> {
        let queries = self.queries();
        let wanted = |name: &str| {
            let namespace = name.split_inclusive(':').next().unwrap_or_default();
            let is_bitmap = name.starts_with(DIRTY_BITMAP_PREFIX);
            queries.is_empty()
                || queries.contains(name.as_bytes())
                || queries.contains(namespace.as_bytes())
                || (is_bitmap && queries.contains(DIRTY_BITMAP_PREFIX.as_bytes()))
        };
        contexts(export).filter(|context| wanted(&context.name)).collect()
    }

    /// The contexts that a selection names; nothing stands for several here.
    pub(super) fn selected(&self, export: &ExportInfo) -> Selection {
        let queries = self.queries();
        let wanted = |context: &SelectedContext| queries.contains(context.name.as_bytes());
        Selection {
            canonical_name: export.canonical_name.clone(),
            contexts: contexts(export).filter(wanted).collect(),
        }
    }

    fn queries(&self) -> BTreeSet<&[u8]> {
        let mut reader = Reader::new(&self.queries);
        std::iter::from_fn(|| reader.bytes_u32()).collect()
    }
}

impl Selection {
    /// What was selected.
    pub(super) fn contexts(&self) -> &[SelectedContext] {
        &self.contexts
    }

    /// What counts of it for this export: nothing if it was made for another one, or if the export
    /// is no longer what it was.
    pub(super) fn for_export(&self, export: &ExportInfo) -> &[SelectedContext] {
        let is_there =
            |selected: &SelectedContext| contexts(export).any(|context| context == *selected);
        if self.canonical_name == export.canonical_name && self.contexts.iter().all(is_there) {
            &self.contexts
        } else {
            &[]
        }
    }
}

/// All contexts of an export, with their ids: from 1, because lists say 0.
fn contexts(export: &ExportInfo) -> impl Iterator<Item = SelectedContext> {
    let names = std::iter::once(BASE_ALLOCATION).chain(export.contexts.iter().map(String::as_str));
    (1..).zip(names).map(|(id, name)| SelectedContext { id, name: name.to_owned() })
}
