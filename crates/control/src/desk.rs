//! [`Desk`]: what stands beside a machine before it is built, and becomes its control socket.

use std::sync::Arc;

use bytes::Bytes;
use wardian_machine::{Event, Machine, Screen};

use crate::console::Hub;
use crate::events::EventLog;
use crate::place::Directory;
use crate::server::{Server, ServerError};

/// Collects what a machine prints and what happens to it, for its control socket.
#[derive(Clone, Default)]
pub struct Desk {
    pub(crate) hub: Arc<Hub>,
    pub(crate) events: Arc<EventLog>,
}

impl Desk {
    /// A desk for one machine.
    #[must_use]
    pub fn new() -> Desk {
        Desk::default()
    }

    /// The screen on which the machine is to print.
    #[must_use]
    pub fn screen(&self) -> Screen {
        let hub = Arc::clone(&self.hub);
        Arc::new(move |bytes| hub.show(bytes))
    }

    /// Something happened to the machine.
    pub fn event(&self, event: &Event) {
        if let Ok(mut line) = serde_json::to_vec(event) {
            line.push(b'\n');
            self.events.push(Bytes::from(line));
        }
    }

    /// Opens the machine's control socket.
    ///
    /// # Errors
    /// When the name is taken, or the host gives no socket or thread.
    pub fn open(self, machine: &Machine, directory: &Directory) -> Result<Server, ServerError> {
        Server::start(self, machine, directory)
    }
}
