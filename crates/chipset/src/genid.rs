//! The generation ID of the machine: 128 bits in guest memory that change when the machine may not be the only one
//! that goes on from here (Microsoft, Virtual Machine Generation ID, 2012). The guest is told by a general-purpose
//! event, whose method in the DSDT notifies the device; Linux then seeds its random numbers anew.

mod persist;

use std::sync::{Arc, Mutex};

use wardian_memory::{Gpa, GuestMemory, MemoryError};

use crate::layout;
use crate::pm::Pm;
use crate::wire::lock;

pub use persist::GenerationIdState;

/// The general-purpose event that says that the ID has changed.
pub const GENERATION_EVENT: u8 = 5;

/// The ID, in guest memory at [`layout::GENERATION_ID`].
pub struct GenerationId {
    memory: GuestMemory,
    pm: Arc<Pm>,
    id: Mutex<[u8; 16]>,
}

impl GenerationId {
    /// Puts `id`, which is random, into `memory`; changes are told by `pm`.
    ///
    /// # Errors
    /// When the machine has no memory there.
    pub fn new(memory: &GuestMemory, pm: Arc<Pm>, id: [u8; 16]) -> Result<GenerationId, MemoryError> {
        memory.write(Gpa(layout::GENERATION_ID), &id)?;
        Ok(GenerationId { memory: memory.clone(), pm, id: Mutex::new(id) })
    }

    /// The ID.
    #[must_use]
    pub fn get(&self) -> [u8; 16] {
        *lock(&self.id)
    }

    /// The machine is another from here on: `id` takes the place of the old one and the guest is told.
    ///
    /// # Errors
    /// When the machine has no memory there.
    pub fn change(&self, id: [u8; 16]) -> Result<(), MemoryError> {
        {
            let mut own = lock(&self.id);
            self.memory.write(Gpa(layout::GENERATION_ID), &id)?;
            *own = id;
        }
        self.pm.raise_event(GENERATION_EVENT);
        Ok(())
    }
}

impl std::fmt::Debug for GenerationId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GenerationId").field("id", &self.get()).finish_non_exhaustive()
    }
}
