//! What is saved of the generation ID. It has no line of its own; its event waits in the power-management block.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use wardian_memory::GuestMemory;
use wardian_state::{Record, Refused, hex};

use super::GenerationId;
use crate::pm::Pm;

/// The generation ID as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationIdState {
    /// The bytes of the ID as the guest's memory has them.
    #[serde(with = "hex")]
    pub id: [u8; 16],
}

impl Record for GenerationIdState {
    const KIND: &'static str = "generation-id";
    const VERSION: u16 = 1;
}

impl GenerationId {
    /// What to save.
    #[must_use]
    pub fn save(&self) -> GenerationIdState {
        GenerationIdState { id: self.get() }
    }

    /// The ID that was saved as `state`, which restored memory holds already, told by the restored `pm`. If the
    /// machine may go on from `state` more than once, [`GenerationId::change`] follows, before its vCPUs run.
    ///
    /// # Errors
    /// When no machine has that ID.
    pub fn restore(
        memory: &GuestMemory,
        pm: Arc<Pm>,
        state: &GenerationIdState,
    ) -> Result<GenerationId, Refused> {
        Refused::unless::<GenerationIdState>(state.id != [0; 16], "id: all zeros stand for none")?;
        Ok(GenerationId { memory: memory.clone(), pm, id: Mutex::new(state.id) })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{GENERATION_EVENT, GenerationId};
    use super::GenerationIdState;
    use crate::layout::{GENERATION_ID, GSI_SCI};
    use crate::pm::Pm;
    use crate::power::tests::Requests;
    use crate::testing::twin::golden;
    use crate::testing::{Clock, at, read};
    use crate::wire::tests::Recorder;
    use std::sync::Arc;
    use wardian_bus::Device;
    use wardian_memory::{Gpa, GuestMemory};

    fn in_memory(memory: &GuestMemory) -> [u8; 16] {
        let mut id = [0; 16];
        memory.read(Gpa(GENERATION_ID), &mut id).unwrap();
        id
    }

    #[test]
    fn a_change_is_in_memory_before_the_guest_is_told() {
        let (clock, chip, memory) = (Clock::new(), Recorder::new(), GuestMemory::new(2 << 20).unwrap());
        let pm = Pm::new(&clock.queue, chip.line(GSI_SCI), Arc::new(Requests::default()));
        pm.write(at(0x12), &(1u16 << GENERATION_EVENT).to_le_bytes());
        let id = GenerationId::new(&memory, Arc::clone(&pm), [7; 16]).unwrap();
        assert_eq!((in_memory(&memory), id.get(), chip.level(GSI_SCI)), ([7; 16], [7; 16], false));
        id.change([8; 16]).unwrap();
        assert_eq!((in_memory(&memory), id.get(), chip.level(GSI_SCI)), ([8; 16], [8; 16], true));
        assert_eq!(read(&*pm, 0x10), (1u16 << GENERATION_EVENT).to_le_bytes());
    }

    #[test]
    fn it_stays_after_restore_until_it_is_changed() {
        let (clock, chip, memory) = (Clock::new(), Recorder::new(), GuestMemory::new(2 << 20).unwrap());
        let pm = Pm::new(&clock.queue, chip.line(GSI_SCI), Arc::new(Requests::default()));
        let state = golden(|| GenerationIdState { id: *b"\x01\x23\x45\x67\x89\xab\xcd\xefWardian!" });
        let id = GenerationId::restore(&memory, Arc::clone(&pm), &state).unwrap();
        assert_eq!((id.save(), chip.level(GSI_SCI)), (state, false));
        let none = GenerationIdState { id: [0; 16] };
        assert!(GenerationId::restore(&memory, pm, &none).unwrap_err().why.starts_with("id:"));
    }
}
