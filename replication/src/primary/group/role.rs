use crate::state::{Record, Role};
use crate::{Error, Result};

/// Whether a side with this record can be run as a primary.
pub(crate) fn check_role(record: &Record) -> Result<()> {
    let secondary = &record.secondary;
    let reason = match record.role {
        Role::Primary => return Ok(()),
        // It was a primary, and nothing has been changed since.
        Role::Secondary if secondary.outdated && !secondary.inconsistent => return Ok(()),
        Role::Secondary if secondary.outdated => {
            "this side was a primary, and is being brought to the line of another one: start it \
             with brep secondary"
        }
        Role::Secondary => {
            "this is the state of a secondary: start it with brep secondary; to make it the disk, \
             brep failover when it runs"
        }
    };
    Err(Error::refused(reason))
}
