//! Where an exit finds its device.

use std::sync::Arc;

use wardian_bus::Bus;
use wardian_cpu::{Answer, Exit};

/// Model-specific registers that live outside the processor: those of the local APIC.
pub(crate) trait Msrs: Send + Sync {
    /// RDMSR by vCPU `vcpu`; `None`: #GP.
    fn read(&self, vcpu: usize, index: u32) -> Option<u64>;
    /// WRMSR; false: #GP.
    fn write(&self, vcpu: usize, index: u32, value: u64) -> bool;
}

/// The address spaces of one machine.
pub(crate) struct Board {
    /// Ports.
    pub(crate) ports: Bus,
    /// Physical addresses that are not RAM.
    pub(crate) mmio: Bus,
    /// Model-specific registers.
    pub(crate) msrs: Arc<dyn Msrs>,
}

/// A size that an engine may ask for.
fn width(size: u8) -> usize {
    usize::from(size).clamp(1, 8)
}

impl Board {
    fn read(bus: &Bus, vcpu: usize, address: u64, size: u8) -> u64 {
        let mut data = [0; 8];
        bus.read(vcpu, address, &mut data[..width(size)]);
        u64::from_le_bytes(data)
    }

    fn write(bus: &Bus, vcpu: usize, address: u64, size: u8, value: u64) {
        bus.write(vcpu, address, &value.to_le_bytes()[..width(size)]);
    }

    /// The answer to an exit of vCPU `vcpu` that asks the machine for something.
    pub(crate) fn handle(&self, vcpu: usize, exit: &Exit) -> Answer {
        match *exit {
            Exit::PortIn { port, size } => Answer::Data(Self::read(&self.ports, vcpu, port.into(), size)),
            Exit::PortOut { port, size, data } => {
                Self::write(&self.ports, vcpu, port.into(), size, data.into());
                Answer::None
            }
            Exit::MmioRead { gpa, size } => Answer::Data(Self::read(&self.mmio, vcpu, gpa, size)),
            Exit::MmioWrite { gpa, size, data } => {
                Self::write(&self.mmio, vcpu, gpa, size, data);
                Answer::None
            }
            Exit::MsrRead { index } => self.msrs.read(vcpu, index).map_or(Answer::Fault, Answer::Data),
            Exit::MsrWrite { index, value } if self.msrs.write(vcpu, index, value) => Answer::None,
            Exit::MsrWrite { .. } => Answer::Fault,
            // KVM_ENOSYS: no hypercall is offered (Linux, Documentation/virt/kvm/x86/hypercalls.rst).
            Exit::Hypercall { .. } => Answer::Data(-1000i64 as u64),
            Exit::Halt | Exit::Shutdown | Exit::Debug(_) | Exit::Interrupted | Exit::Limit => Answer::None,
        }
    }
}
