use brep_block::Error;

/// Why a quorum could not be made, or its children not changed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum QuorumError {
    /// A quorum needs a child.
    #[error("Number of provided children must be 1 or more")]
    NoChildren,
    /// The threshold is 0.
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
    /// The device is a child of this quorum already. Holds the node's name.
    #[error("The node {0} already has a parent")]
    HasParent(String),
    /// Fewer children could not reach the threshold. Holds the threshold.
    #[error("The number of children cannot be lower than the vote threshold {0}")]
    TooFewChildren(usize),
    /// There is no child of that name. Holds the names of quorum and child.
    #[error("Node '{0}' does not have child '{1}'")]
    NoSuchChild(String, String),
}
