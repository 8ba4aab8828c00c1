//! The host bridge at 00:00.0.

use std::sync::Mutex;

use wardian_bus::pci::{ConfigSpace, ConfigState, Function, Identity, MappedBar};
use wardian_state::check::Wrong;

use crate::wire::lock;

/// A host bridge without BARs, as the generic one of Red Hat's PCI IDs (1b36:0008), which no driver claims.
pub(super) struct HostBridge {
    config: Mutex<ConfigSpace>,
}

impl HostBridge {
    pub(super) fn new() -> HostBridge {
        HostBridge { config: Mutex::new(Self::config()) }
    }

    pub(super) fn save(&self) -> ConfigState {
        lock(&self.config).save()
    }

    pub(super) fn restore(state: &ConfigState) -> Result<HostBridge, Wrong> {
        Ok(HostBridge { config: Mutex::new(Self::config().restore(state)?) })
    }

    fn config() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1b36,
            device: 0x0008,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            class: 0x06_00_00,
            revision: 0,
        };
        ConfigSpace::new(&identity)
    }
}

impl Function for HostBridge {
    fn name(&self) -> &str {
        "host-bridge"
    }

    fn config_read(&self, offset: usize, data: &mut [u8]) {
        lock(&self.config).read(offset, data);
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        lock(&self.config).write(offset, data);
    }

    fn mapped_bars(&self) -> Vec<MappedBar> {
        Vec::new()
    }

    fn bar_sizes(&self) -> Vec<(usize, u64)> {
        Vec::new()
    }

    fn bar_read(&self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _bar: usize, _offset: u64, _data: &[u8]) {}
}
