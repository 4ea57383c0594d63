use std::sync::Arc;

use brep_block::{BlockDevice, Error, ErrorKind, Operation, ReplicationMode, Result};

pub(super) fn unsupported(device: &dyn BlockDevice) -> Error {
    Error::new(
        Operation::Control,
        ErrorKind::Unsupported,
        device.name(),
        "this feature or command is not currently supported",
    )
}

/// Starts replication on every disk. One that is a backing reference's target
/// ([`ReferenceTarget`](super::ReferenceTarget)) is skipped by this call and by the others: the disk
/// that refers to it replicates.
///
/// # Errors
/// The first that fails; those that were started before it are stopped again, without failover,
/// so that nothing is left half started.
pub async fn start_all(disks: &[Arc<dyn BlockDevice>], mode: ReplicationMode) -> Result<()> {
    for (index, disk) in disks.iter().enumerate() {
        let started = match disk.replication() {
            Some(replication) => replication.start(mode).await,
            None => Err(unsupported(&**disk)),
        };
        if let Err(error) = started {
            for begun in disks[..index].iter().rev() {
                if let Some(replication) = begun.replication()
                    && let Err(also) = replication.stop(false).await
                {
                    tracing::error!(disk = begun.name(), %also, "cannot be stopped again");
                }
            }
            return Err(error);
        }
    }
    Ok(())
}

/// Takes a checkpoint on every disk.
///
/// # Errors
/// The first that fails; those after it were not asked, and have their old checkpoint.
pub async fn checkpoint_all(disks: &[Arc<dyn BlockDevice>]) -> Result<()> {
    for disk in disks {
        disk.replication().ok_or_else(|| unsupported(&**disk))?.checkpoint().await?;
    }
    Ok(())
}

/// Stops replication on every disk, past failures.
///
/// # Errors
/// The first failure; every disk was asked all the same.
pub async fn stop_all(disks: &[Arc<dyn BlockDevice>], failover: bool) -> Result<()> {
    let mut result = Ok(());
    for disk in disks {
        let stopped = match disk.replication() {
            Some(replication) => replication.stop(failover).await,
            None => Err(unsupported(&**disk)),
        };
        result = result.and(stopped);
    }
    result
}

/// The first error that any disk has met and no guest was told of.
///
/// # Errors
/// That error.
pub async fn error_all(disks: &[Arc<dyn BlockDevice>]) -> Result<()> {
    for disk in disks {
        disk.replication().ok_or_else(|| unsupported(&**disk))?.error().await?;
    }
    Ok(())
}
