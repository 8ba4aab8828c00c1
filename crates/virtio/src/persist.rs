//! What is saved of a virtio device: its registers, its rings' positions, what the device itself holds.
//!
//! It is saved while it is paused: between two requests, so none is in flight. The restored device is paused, too,
//! and looks at every ring when it is resumed, whether the driver had rung or not.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use serde::{Deserialize, Serialize};
use wardian_state::{Record, Refused};

use crate::ring::{Layout, Ring};
use crate::transport::{BAR_LEN, PENDING, PciTransport, QueueRegisters, TABLE};
use crate::worker::{Active, NO_VECTOR};

/// Bytes of configuration space that are saved: all but the extended space, which is empty.
pub(crate) const CONFIG_LEN: usize = 0x100;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK: u16 = 1 << 14;

/// One queue as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Entries.
    pub size: u16,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the available ring.
    pub driver: u64,
    /// Address of the used ring.
    pub device: u64,
    /// The driver has enabled it.
    pub enabled: bool,
    /// Its MSI-X vector.
    pub vector: u16,
    /// Indexes of the next available and the next used entry; none if it is not served.
    pub position: Option<(u16, u16)>,
}

/// What a device holds besides what its driver can see.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OwnState {
    /// Nothing.
    None,
    /// A disk.
    Block {
        /// Its ID.
        #[serde(with = "wardian_state::hex")]
        id: [u8; 20],
        /// Its bytes.
        size: u64,
        /// The guest may only read it.
        read_only: bool,
    },
    /// A console.
    Console {
        /// Typed bytes that the guest has not taken.
        #[serde(with = "wardian_state::hex")]
        typed: Vec<u8>,
    },
}

/// A virtio device as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioState {
    /// Its name.
    pub device: String,
    /// Configuration space.
    #[serde(with = "wardian_state::hex")]
    pub config: Vec<u8>,
    /// The MSI-X table.
    #[serde(with = "wardian_state::hex")]
    pub msix_table: Vec<u8>,
    /// Vectors that are pending.
    pub msix_pending: Vec<u16>,
    /// Registers of the common configuration structure.
    pub device_feature_select: u32,
    /// Likewise.
    pub driver_feature_select: u32,
    /// Features that the driver took.
    pub driver_features: u64,
    /// Device status as written.
    pub status: u8,
    /// The status that the driver reads until it has seen that its reset is done, or 0.
    pub resetting: u8,
    /// Selected queue.
    pub queue_select: u16,
    /// Vector for changes of the configuration.
    pub config_vector: u16,
    /// Interrupt status.
    pub isr: u8,
    /// The device waits for a reset.
    pub broken: bool,
    /// Queues.
    pub queues: Vec<QueueState>,
    /// What the device holds.
    pub own: OwnState,
}

impl Record for VirtioState {
    const KIND: &'static str = "virtio";
    const VERSION: u16 = 1;
}

fn refuse(why: impl Into<String>) -> Refused {
    Refused::new::<VirtioState>(why)
}

impl PciTransport {
    /// What to save; the device is paused.
    #[must_use]
    pub fn save(&self) -> VirtioState {
        let registers = self.registers();
        let shared = &self.shared;
        let mut config = vec![0; CONFIG_LEN];
        registers.pci.read(0, &mut config);
        let mut msix_table = vec![0; shared.msix.table_len() as usize];
        shared.msix.table_read(0, &mut msix_table);
        let mut bits = vec![0; shared.msix.pending_len() as usize];
        shared.msix.pending_read(0, &mut bits);
        let is_pending = |vector: &u16| bits[usize::from(*vector) / 8] >> (vector % 8) & 1 != 0;
        let queue = |(queue, slot): (&QueueRegisters, &Arc<crate::worker::Slot>)| QueueState {
            size: queue.layout.size,
            descriptors: queue.layout.descriptors,
            driver: queue.layout.driver,
            device: queue.layout.device,
            enabled: queue.enabled,
            vector: slot.vector.load(Ordering::Acquire),
            position: slot.position(),
        };
        VirtioState {
            device: shared.device.name().to_owned(),
            config,
            msix_table,
            msix_pending: (0..shared.msix.vectors()).filter(is_pending).collect(),
            device_feature_select: registers.device_feature_select,
            driver_feature_select: registers.driver_feature_select,
            driver_features: registers.driver_features,
            status: registers.status,
            resetting: registers.resetting,
            queue_select: registers.queue_select,
            config_vector: shared.config_vector.load(Ordering::Acquire),
            isr: shared.isr.load(Ordering::Acquire),
            broken: shared.broken.load(Ordering::Acquire),
            queues: registers.queues.iter().zip(&shared.slots).map(queue).collect(),
            own: shared.device.save(),
        }
    }

    /// Takes over what was saved, before the workers are there.
    pub(crate) fn load(&mut self, state: &VirtioState) -> Result<(), Refused> {
        let shared = Arc::clone(&self.shared);
        if state.device != shared.device.name() {
            return Err(refuse(format!("it is a {}, not a {}", state.device, shared.device.name())));
        }
        if state.queues.len() != self.max_sizes.len() {
            return Err(refuse(format!("{} has {} queues", state.device, state.queues.len())));
        }
        if state.driver_features & !self.features != 0 {
            let odd = state.driver_features & !self.features;
            return Err(refuse(format!("the driver of {} uses features {odd:#x}", state.device)));
        }
        shared.device.check(&state.own)?;
        let vectors = shared.msix.vectors();
        let is_vector = |vector: u16| vector == NO_VECTOR || vector < vectors;
        let mut all = state.queues.iter().map(|queue| queue.vector);
        let good = all.all(is_vector) && is_vector(state.config_vector);
        if !good || state.msix_pending.iter().any(|vector| *vector >= vectors) {
            return Err(refuse(format!("{} has no such interrupt vector", state.device)));
        }
        self.load_config(state)?;
        let registers = self.registers.get_mut().unwrap_or_else(PoisonError::into_inner);
        registers.device_feature_select = state.device_feature_select;
        registers.driver_feature_select = state.driver_feature_select;
        registers.driver_features = state.driver_features;
        registers.status = state.status;
        registers.resetting = state.resetting;
        registers.queue_select = state.queue_select;
        shared.config_vector.store(state.config_vector, Ordering::Release);
        shared.isr.store(state.isr, Ordering::Release);
        shared.broken.store(state.broken, Ordering::Release);
        let event_idx = state.driver_features & crate::device::F_EVENT_IDX != 0;
        for (number, saved) in state.queues.iter().enumerate() {
            let QueueState { size, descriptors, driver, device, .. } = *saved;
            let max = self.max_sizes[number];
            if size > max || !size.is_power_of_two() {
                return Err(refuse(format!("queue {number} of {} has {size} entries", state.device)));
            }
            let layout = Layout { size, descriptors, driver, device };
            registers.queues[number] = QueueRegisters { layout, enabled: saved.enabled };
            shared.slots[number].vector.store(saved.vector, Ordering::Release);
            if let Some(position) = saved.position {
                let ring = Ring::resume(&shared.mem, layout, event_idx, position)
                    .map_err(|_| refuse(format!("queue {number} of {} is no ring", state.device)))?;
                shared.slots[number].activate(Active { ring, features: state.driver_features });
            }
        }
        Ok(())
    }

    fn load_config(&mut self, state: &VirtioState) -> Result<(), Refused> {
        let msix = &self.shared.msix;
        if state.config.len() != CONFIG_LEN || state.msix_table.len() as u64 != msix.table_len() {
            return Err(refuse(format!("{} has registers of another length", state.device)));
        }
        // Message control goes to MSI-X as well, last: what is pending is sent only where it may be.
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK);
        for vector in &state.msix_pending {
            let _ = msix.signal(*vector);
        }
        for (n, word) in state.msix_table.chunks_exact(4).enumerate() {
            msix.table_write(n as u64 * 4, word);
        }
        let registers = self.registers.get_mut().unwrap_or_else(PoisonError::into_inner);
        registers.pci.write(0, &state.config);
        let mut now = vec![0; CONFIG_LEN];
        registers.pci.read(0, &mut now);
        if let Some(at) = now.iter().zip(&state.config).position(|(now, saved)| now != saved) {
            return Err(refuse(format!("{} has another configuration space, at {at:#x}", state.device)));
        }
        msix.set_control(registers.pci.word(self.msix_control));
        Ok(())
    }
}

// The saved table and pending bits lie within the BAR.
const _: () = assert!(TABLE < PENDING && PENDING < BAR_LEN);
