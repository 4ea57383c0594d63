//! Maps of a side, as a model.

use super::{CELLS, Cells, Commit, CopyMode, Since};
use crate::link::MapsInfo;

#[derive(Debug, Clone)]
pub(super) struct Maps {
    pub(super) open: (Cells, Since),
    pub(super) pending: Option<(Cells, Since)>,
    pub(super) differs: (Cells, Since),
}

impl Maps {
    pub(super) fn new(since: Since) -> Self {
        let empty = (Cells::new(), since);
        Maps { open: empty.clone(), pending: None, differs: empty }
    }

    pub(super) fn unknown() -> Self {
        let mut maps = Self::new(Since::Unknown);
        maps.differs.0 = (0..CELLS).collect();
        maps
    }

    pub(super) fn void_pending(&mut self) {
        if let Some((cells, since)) = self.pending.take() {
            self.open.0.extend(cells);
            self.open.1 = since;
        }
    }

    pub(super) fn begin_copy(&mut self, mode: CopyMode) {
        self.void_pending();
        match mode {
            CopyMode::Full | CopyMode::Compare => {
                self.differs = ((0..CELLS).collect(), Since::Ever);
                self.open.1 = Since::Ever;
            }
            CopyMode::Changed => self.differs.0.append(&mut self.open.0),
            CopyMode::Missing => {}
        }
    }

    pub(super) fn all(&self) -> Cells {
        let pending = self.pending.iter().flat_map(|p| &p.0);
        self.open.0.iter().chain(pending).chain(&self.differs.0).copied().collect()
    }

    pub(super) fn info(&self) -> Option<MapsInfo> {
        let oldest = self.pending.as_ref().map_or(self.open.1, |p| p.1);
        let mut since: Option<Commit> = None;
        for tag in [self.differs.1, oldest] {
            match tag {
                Since::Unknown => return None,
                Since::Ever => {}
                Since::Commit(c) if since.is_some_and(|s| s.epoch >= c.epoch) => {}
                Since::Commit(c) => since = Some(c),
            }
        }
        Some(MapsInfo { since, bytes: vec![self.all().len() as u64] })
    }
}
