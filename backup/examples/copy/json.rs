//! Jobs, events and bitmaps as QEMU's monitor writes them.

use std::time::{SystemTime, UNIX_EPOCH};

use brep_backup::{BitmapInfo, JobEvent, JobInfo};
use serde_json::{Value, json};

pub(crate) fn event(event: &JobEvent) -> Value {
    let (name, data) = match event {
        JobEvent::StatusChange { id, status } => {
            ("JOB_STATUS_CHANGE", json!({ "id": id, "status": status.to_string() }))
        }
        JobEvent::Error { id, operation, action, error } => {
            let data = json!({
                "device": id,
                "operation": operation.to_string(),
                "action": action.to_string(),
                "reason": error.to_string(),
            });
            ("BLOCK_JOB_ERROR", data)
        }
        JobEvent::Pending { id } => ("BLOCK_JOB_PENDING", json!({ "type": "backup", "id": id })),
        JobEvent::Completed(info) => ("BLOCK_JOB_COMPLETED", ended(info)),
        JobEvent::Cancelled(info) => ("BLOCK_JOB_CANCELLED", ended(info)),
        _ => ("UNKNOWN", Value::Null),
    };
    with_timestamp(name, &data)
}

/// An event of this program's own: others may use the target of a job.
pub(crate) fn target_closed(id: &str, error: Option<String>) -> Value {
    let mut data = json!({ "device": id });
    if let Some(error) = error {
        data["error"] = error.into();
    }
    with_timestamp("TARGET_CLOSED", &data)
}

fn with_timestamp(name: &str, data: &Value) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let timestamp = json!({ "seconds": now.as_secs(), "microseconds": now.subsec_micros() });
    json!({ "event": name, "data": data, "timestamp": timestamp })
}

fn ended(info: &JobInfo) -> Value {
    let mut data = json!({
        "type": "backup",
        "device": info.id,
        "len": info.progress.len,
        "offset": info.progress.offset,
        "speed": info.speed,
    });
    if let Some(error) = &info.error {
        data["error"] = error.to_string().into();
    }
    data
}

pub(crate) fn job(info: &JobInfo) -> Value {
    let mut data = ended(info);
    data["busy"] = info.busy.into();
    data["paused"] = info.paused.into();
    data["io-status"] = info.io_status.to_string().into();
    data["ready"] = false.into();
    data["status"] = info.status.to_string().into();
    data["auto-finalize"] = info.auto_finalize.into();
    data["auto-dismiss"] = info.auto_dismiss.into();
    data
}

pub(crate) fn bitmap(info: &BitmapInfo) -> Value {
    json!({
        "name": info.name,
        "granularity": info.granularity,
        "count": info.count,
        "recording": info.recording,
        "busy": info.busy,
        "persistent": false,
        "inconsistent": info.inconsistent,
    })
}
