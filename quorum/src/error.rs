use brep_block::Error;

/// Why a quorum could not be made, or its children not changed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum QuorumError {
    /// The children of an option string are not numbered 0, 1, 2, … without a hole.
    #[error("Option children is not a valid array")]
    ChildrenArray,
    /// A quorum needs a child.
    #[error("Number of provided children must be 1 or more")]
    NoChildren,
    /// A child of an option string is both named and described. Holds its option.
    #[error("{0} is the name of a node, which takes no further options: drop the name or them")]
    ReferenceWithOptions(String),
    /// An option wants a number. Holds its name.
    #[error("parameter '{0}' expects a number")]
    NotANumber(&'static str),
    /// An option wants to be switched. Holds its name.
    #[error("parameter '{0}' expects 'on' or 'off'")]
    NotABool(&'static str),
    /// The threshold is less than 1.
    #[error("parameter 'vote-threshold' expects a value >= 1")]
    ThresholdTooLow,
    /// The threshold could never be reached.
    #[error("threshold may not exceed children count")]
    ThresholdTooHigh,
    /// A read pattern that does not exist.
    #[error("Please set read-pattern as fifo or quorum")]
    UnknownReadPattern,
    /// Comparison mode compares two children, and both must agree.
    #[error("blkverify needs exactly 2 children and a vote-threshold of 2")]
    BlkverifyChildren,
    /// Comparison mode reports differences, it repairs none.
    #[error("rewrite-corrupted cannot be used together with blkverify")]
    BlkverifyRewrite,
    /// The children do not agree on the size, or none of them knows it.
    #[error("{0}")]
    Size(Error),
    /// Comparison mode has exactly two children.
    #[error("Cannot add a child to a quorum in blkverify mode")]
    BlkverifyAdd,
    /// The device is a child already. Holds the node's name.
    #[error("The node {0} already has a parent")]
    HasParent(String),
    /// Fewer children could not reach the threshold. Holds the threshold.
    #[error("The number of children cannot be lower than the vote threshold {0}")]
    TooFewChildren(usize),
    /// There is no child of that name. Holds the names of quorum and child.
    #[error("Node '{0}' does not have child '{1}'")]
    NoSuchChild(String, String),
    /// A change of children both adds and removes.
    #[error("The parameters child and node are in conflict")]
    ChildAndNode,
    /// A change of children neither adds nor removes.
    #[error("Either child or node must be specified")]
    NeitherChildNorNode,
    /// There is no node of that name to be changed. Holds the name.
    #[error("Cannot find device='{0}' nor node-name='{0}'")]
    NoSuchParent(String),
    /// There is no node of that name to be added. Holds the name.
    #[error("Node '{0}' not found")]
    NoSuchNode(String),
    /// The node to be changed is no quorum. Holds its name.
    #[error("The node {0} does not support adding a child")]
    CannotAdd(String),
    /// The node to be changed is no quorum. Holds its name.
    #[error("The node {0} does not support removing a child")]
    CannotRemove(String),
}

impl QuorumError {
    /// The number of the error as Linux knows it.
    #[must_use]
    pub fn errno(&self) -> i32 {
        const EINVAL: i32 = 22;
        const ERANGE: i32 = 34;
        match self {
            QuorumError::ThresholdTooLow | QuorumError::ThresholdTooHigh => ERANGE,
            QuorumError::Size(error) => error.errno(),
            _ => EINVAL,
        }
    }
}
