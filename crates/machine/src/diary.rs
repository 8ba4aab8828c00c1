//! What happens to the machine, told as it happens: to whoever listens, and to a file of JSON lines.

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use wardian_backend::Output;
use wardian_time::Nanos;

use crate::verdict::{Verdict, Window};

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
pub enum Happening {
    /// The machine was paused.
    Paused,
    /// A pause is over.
    Resumed {
        /// How long it was, by the host's clock.
        paused_ns: u64,
        /// By how much guest time was moved for it.
        guest_moved_ns: u64,
    },
    /// The machine starts anew.
    Reset,
    /// The machine has ended.
    Ended {
        /// The process status that comes of it.
        status: u8,
    },
    /// The whole process was stopped, or the host was suspended; now it goes on. The guest was told.
    Stopped {
        /// How long, by the host's clock, the time of a suspended host included.
        stopped_ns: u64,
        /// How long the host was suspended.
        suspended_ns: u64,
    },
    /// A vCPU makes no progress, or little.
    NoProgress {
        /// Its number.
        vcpu: usize,
        /// Why.
        verdict: Verdict,
        /// What that is judged by.
        evidence: Box<Window>,
    },
    /// The last such event of this vCPU is over.
    Progress {
        /// Its number.
        vcpu: usize,
        /// How long it was in all.
        after_ns: u64,
    },
}

/// Something that happened to the machine.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Event {
    /// By the host's wall clock, nanoseconds since the Unix epoch.
    pub unix_ns: u64,
    /// Guest time.
    pub guest_ns: u64,
    /// In words.
    pub text: String,
    /// Worth a line on the terminal.
    pub loud: bool,
    /// What happened.
    #[serde(flatten)]
    pub what: Happening,
}

/// Gets every event; called on the thread where it happens, so it must not wait for the machine.
pub(crate) type Listener = Box<dyn Fn(&Event) + Send + Sync>;

/// The diary of one machine, over all its lives. Its lock is held while the listener is called.
#[derive(Default)]
pub(crate) struct Diary(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    listener: Option<Listener>,
    file: Option<Output>,
}

impl Diary {
    pub(crate) fn new() -> Arc<Diary> {
        Arc::default()
    }

    /// From now on `listener` gets every event.
    pub(crate) fn listen(&self, listener: Listener) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).listener = Some(listener);
    }

    /// From now on every event is written to `file`.
    pub(crate) fn write_to(&self, file: Output) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).file = Some(file);
    }

    /// Waits until all is written.
    pub(crate) fn drain(&self) {
        let file = self.0.lock().unwrap_or_else(PoisonError::into_inner).file.clone();
        if let Some(file) = file {
            file.drain();
        }
    }

    /// Something happened at guest time `now`.
    pub(crate) fn tell(&self, now: Nanos, loud: bool, text: String, what: Happening) {
        let event = Event { unix_ns: wardian_time::host_wall().0, guest_ns: now.0, text, loud, what };
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(listener) = &inner.listener {
            listener(&event);
        }
        if let Some(file) = &mut inner.file
            && let Ok(mut line) = serde_json::to_vec(&event)
        {
            line.push(b'\n');
            // The output's own thread tells when the file cannot be written.
            let _ = file.write_all(&line);
        }
    }
}

/// Seconds with one decimal.
pub(crate) fn seconds(span: Nanos) -> String {
    format!("{:.1} s", span.0 as f64 / 1e9)
}
