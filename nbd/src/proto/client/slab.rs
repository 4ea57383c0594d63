/// Values under keys that are never mistaken for one another: a key is the index of a cell,
/// below a number that changes each time the cell is used again.
#[derive(Debug)]
pub(crate) struct Slab<T> {
    cells: Vec<Cell<T>>,
    free: Vec<u32>,
}

#[derive(Debug)]
struct Cell<T> {
    identity: u32,
    value: Option<T>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Slab { cells: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    /// How many values there are.
    pub(crate) fn len(&self) -> usize {
        self.cells.len() - self.free.len()
    }

    pub(crate) fn insert(&mut self, value: T) -> u64 {
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                // Callers bound their numbers far below 2^32.
                let index = u32::try_from(self.cells.len()).expect("a bounded number of values");
                self.cells.push(Cell { identity: 0, value: None });
                index
            }
        };
        let cell = &mut self.cells[index as usize];
        cell.identity = cell.identity.wrapping_add(1);
        cell.value = Some(value);
        u64::from(cell.identity) << 32 | u64::from(index)
    }

    pub(crate) fn get_mut(&mut self, key: u64) -> Option<&mut T> {
        let cell = self.cells.get_mut(index(key))?;
        if cell.identity == (key >> 32) as u32 { cell.value.as_mut() } else { None }
    }

    pub(crate) fn remove(&mut self, key: u64) -> Option<T> {
        let cell = self.cells.get_mut(index(key))?;
        if cell.identity != (key >> 32) as u32 {
            return None;
        }
        let value = cell.value.take()?;
        self.free.push(key as u32);
        Some(value)
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = u64> + '_ {
        self.cells.iter().zip(0u64..).filter_map(|(cell, index)| {
            cell.value.is_some().then_some(u64::from(cell.identity) << 32 | index)
        })
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = &T> + '_ {
        self.cells.iter().filter_map(|cell| cell.value.as_ref())
    }
}

fn index(key: u64) -> usize {
    (key as u32) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_key_does_not_reach_the_new_value_of_its_cell() {
        let mut slab = Slab::default();
        let first = slab.insert('a');
        assert_eq!(slab.remove(first), Some('a'));
        let second = slab.insert('b');
        assert_ne!(first, second);
        assert_eq!(slab.get_mut(first), None);
        assert_eq!(slab.remove(first), None);
        assert_eq!(slab.get_mut(second), Some(&mut 'b'));
        assert_eq!((slab.len(), slab.keys().collect::<Vec<_>>()), (1, vec![second]));
    }

    #[test]
    fn a_key_that_was_never_given_out_reaches_nothing() {
        let mut slab = Slab::default();
        let key = slab.insert('a');
        for wrong in [0, u64::MAX, key + 1, key ^ 1 << 40] {
            assert_eq!(slab.get_mut(wrong), None, "{wrong:#x}");
            assert_eq!(slab.remove(wrong), None, "{wrong:#x}");
        }
        assert_eq!(slab.len(), 1);
    }
}
