use crate::QuorumError;

/// What `x-blockdev-change` asks of a node's children.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChildChange {
    /// Add this node.
    Add {
        /// The node's name.
        node: String,
    },
    /// Remove this child.
    Remove {
        /// The child's name, for example `children.1`.
        child: String,
    },
}

impl ChildChange {
    /// Reads the two parameters of the command, of which it wants exactly one.
    ///
    /// # Errors
    /// [`QuorumError::ChildAndNode`], [`QuorumError::NeitherChildNorNode`].
    pub fn new(child: Option<String>, node: Option<String>) -> Result<Self, QuorumError> {
        match (child, node) {
            (Some(_), Some(_)) => Err(QuorumError::ChildAndNode),
            (None, None) => Err(QuorumError::NeitherChildNorNode),
            (None, Some(node)) => Ok(ChildChange::Add { node }),
            (Some(child), None) => Ok(ChildChange::Remove { child }),
        }
    }

    /// Why it cannot be made of a node called `parent` that is no quorum.
    #[must_use]
    pub fn refused_by(&self, parent: &str) -> QuorumError {
        match self {
            ChildChange::Add { .. } => QuorumError::CannotAdd(parent.to_owned()),
            ChildChange::Remove { .. } => QuorumError::CannotRemove(parent.to_owned()),
        }
    }
}
