//! [`SoftIrqChip`]: the interrupt chips of a machine in software, wired together.
//!
//! Local APICs, IOAPIC and 8259 pair never see each other: each returns what it wants of the others, and
//! this module carries it there without holding any lock. So an EOI may reach the IOAPIC and come back as
//! a new interrupt of the same local APIC.

mod persist;
#[cfg(test)]
mod tests;
mod ticks;

use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use wardian_bus::{Access, Device};
use wardian_irq::{
    Awaited, Delivery, Gsi, IrqChip, Kick, LocalInterrupts, MsiMessage, PendingEvents, TickId, TickLink,
    TickSource,
};
use wardian_time::{Nanos, TickConfig, TimerQueue};

use crate::ioapic::{Ioapic, Request};
use crate::lapic::Lapic;
use crate::lapic::message::{Ipi, Message, Mode, Shorthand};
use crate::lapic::regs::Effect;
use crate::pic::{Pic, Port};
use ticks::{Ticks, wiring};

pub use crate::ioapic::persist::IoapicState;
pub use crate::ioapic::{IOAPIC_BASE, IOAPIC_PINS};
pub use crate::lapic::persist::LapicState;
pub use crate::lapic::{LAPIC_BASE, LAPIC_TIMER_HZ, MsrFault};
pub use crate::pic::persist::{InitState, PicChipState, PicState};
pub use persist::IrqChipState;

/// ISA interrupts that do not arrive at the IOAPIC input of the same number, as (ISA interrupt, input):
/// the interrupt source overrides of the MADT. All other ISA interrupts are wired one to one.
pub const ISA_OVERRIDES: [(u8, u32); 1] = [(0, TIMER_PIN)];
const TIMER_PIN: u32 = 2;

/// The most vCPUs: APIC ID FFh is the broadcast.
pub const MAX_CPUS: usize = 255;

const IA32_APIC_BASE: u32 = 0x1b;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
const X2APIC_FIRST: u32 = 0x800;
const X2APIC_LAST: u32 = 0x8ff;

/// The software interrupt chips of one machine: a local APIC for each vCPU, an IOAPIC, an 8259 pair.
///
/// It holds no lock itself.
pub struct SoftIrqChip {
    lapics: Box<[Arc<Lapic>]>,
    ioapic: Ioapic,
    pic: Pic,
    /// Timers whose ticks pass through here.
    ticks: Ticks,
    /// Where the next lowest-priority arbitration among equals begins.
    turn: AtomicUsize,
    /// Inputs that were up when the chips were saved and that no device has spoken of since.
    unclaimed: AtomicU32,
}

impl SoftIrqChip {
    /// The chips of a machine with `cpus` vCPUs (at least 1, at most [`MAX_CPUS`]; other numbers are
    /// brought into that range). Local APIC timers are served by `queue`.
    #[must_use]
    pub fn new(cpus: usize, queue: &Arc<TimerQueue>) -> Arc<SoftIrqChip> {
        Self::with_ticks(cpus, queue, TickConfig::default())
    }

    /// Likewise, with local APIC timers that treat their ticks as `ticks` says.
    #[must_use]
    pub fn with_ticks(cpus: usize, queue: &Arc<TimerQueue>, ticks: TickConfig) -> Arc<SoftIrqChip> {
        let pic = Pic::new();
        let lapic = |cpu: usize| {
            let lint0 = if cpu == 0 { Arc::clone(pic.output()) } else { Arc::default() };
            Lapic::new(cpu as u32, queue, lint0, ticks)
        };
        let lapics = (0..cpus.clamp(1, MAX_CPUS)).map(lapic).collect();
        Arc::new(SoftIrqChip {
            lapics,
            ioapic: Ioapic::new(),
            pic,
            ticks: Ticks::default(),
            turn: AtomicUsize::new(0),
            unclaimed: AtomicU32::new(0),
        })
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn cpus(&self) -> usize {
        self.lapics.len()
    }

    /// What vCPU `vcpu` holds; `None` if there is no such vCPU.
    #[must_use]
    pub fn local(self: &Arc<Self>, vcpu: usize) -> Option<Arc<dyn LocalInterrupts>> {
        let lapic = Arc::clone(self.lapics.get(vcpu)?);
        Some(Arc::new(Local { vcpu, lapic, chip: Arc::clone(self) }))
    }

    /// RDMSR of `IA32_APIC_BASE`, `IA32_TSC_DEADLINE` and the x2APIC registers (800h-8FFh).
    ///
    /// # Errors
    /// When the guest is to get #GP(0): no such register, write-only, or not in x2APIC mode.
    pub fn msr_read(&self, vcpu: usize, index: u32) -> Result<u64, MsrFault> {
        let lapic = self.lapics.get(vcpu).ok_or(MsrFault)?;
        match index {
            IA32_APIC_BASE => Ok(lapic.apic_base()),
            IA32_TSC_DEADLINE => Ok(lapic.read_deadline()),
            X2APIC_FIRST..=X2APIC_LAST => lapic.msr_read((index - X2APIC_FIRST) as u8),
            _ => Err(MsrFault),
        }
    }

    /// WRMSR likewise.
    ///
    /// # Errors
    /// When the guest is to get #GP(0): no such register, read-only, reserved bits, illegal change of mode.
    pub fn msr_write(&self, vcpu: usize, index: u32, value: u64) -> Result<(), MsrFault> {
        let lapic = self.lapics.get(vcpu).ok_or(MsrFault)?;
        match index {
            IA32_APIC_BASE => lapic.set_apic_base(value),
            IA32_TSC_DEADLINE => {
                lapic.write_deadline(value);
                Ok(())
            }
            X2APIC_FIRST..=X2APIC_LAST => {
                let effect = lapic.msr_write((index - X2APIC_FIRST) as u8, value)?;
                self.perform(vcpu, effect);
                Ok(())
            }
            _ => Err(MsrFault),
        }
    }

    /// States the guest TSC of a vCPU minus that of the time base, after the guest wrote `IA32_TSC` or
    /// `IA32_TSC_ADJUST`: TSC deadlines count in the vCPU's own TSC.
    pub fn set_tsc_adjust(&self, vcpu: usize, adjust: u64) {
        if let Some(lapic) = self.lapics.get(vcpu) {
            lapic.set_tsc_adjust(adjust);
        }
    }

    /// The local APIC page, to be mapped for 4 KiB at [`LAPIC_BASE`].
    #[must_use]
    pub fn lapic_device(self: &Arc<Self>) -> Arc<dyn Device> {
        Arc::new(LapicPage(Arc::clone(self)))
    }

    /// The IOAPIC page, to be mapped for 4 KiB at [`IOAPIC_BASE`].
    #[must_use]
    pub fn ioapic_device(self: &Arc<Self>) -> Arc<dyn Device> {
        Arc::new(IoapicPage(Arc::clone(self)))
    }

    /// The ports of the 8259 pair and its edge/level registers.
    #[must_use]
    pub fn pic_devices(self: &Arc<Self>) -> Vec<(Range<u64>, Arc<dyn Device>)> {
        let ports = |first: u64, ports: [Port; 2]| {
            let device: Arc<dyn Device> = Arc::new(PicPorts { chip: Arc::clone(self), ports });
            (first..first + 2, device)
        };
        let chip = |master| [Port::Command { master }, Port::Data { master }];
        vec![
            ports(0x20, chip(true)),
            ports(0xa0, chip(false)),
            ports(0x4d0, [Port::Elcr { master: true }, Port::Elcr { master: false }]),
        ]
    }

    // ---- Carrying things between the chips; no lock is held here ----

    fn perform(&self, from: usize, effect: Option<Effect>) {
        match effect {
            None => {}
            Some(Effect::Ipi(ipi)) => drop(self.send_ipi(from, &ipi)),
            Some(Effect::Eoi(vector)) => self.send_all(self.ioapic.eoi(vector)),
            Some(Effect::Enabled) => {
                self.send_all(self.ioapic.waiting());
                self.ticks.retry();
            }
        }
    }

    fn send_ipi(&self, from: usize, ipi: &Ipi) -> Delivery {
        let to = |range: &mut dyn Iterator<Item = usize>| {
            range.map(|cpu| self.lapics[cpu].accept(&ipi.message)).fold(Delivery::Masked, best)
        };
        let all = 0..self.lapics.len();
        match ipi.shorthand {
            Shorthand::None => self.deliver(&ipi.message),
            Shorthand::Own => to(&mut std::iter::once(from)),
            Shorthand::All => to(&mut all.into_iter()),
            Shorthand::Others => to(&mut all.into_iter().filter(|cpu| *cpu != from)),
        }
    }

    /// Delivers by destination field; accepted if anybody accepts.
    fn deliver(&self, message: &Message) -> Delivery {
        if !message.logical && !message.is_broadcast() {
            return self
                .lapics
                .get(message.dest as usize)
                .map_or(Delivery::Masked, |one| one.accept(message));
        }
        if message.mode == Mode::Lowest {
            return self.arbitrate(message).map_or(Delivery::Masked, |cpu| self.lapics[cpu].accept(message));
        }
        self.lapics.iter().map(|lapic| lapic.receive(message)).fold(Delivery::Masked, best)
    }

    /// The vCPU of lowest priority among the destinations; equals take turns.
    fn arbitrate(&self, message: &Message) -> Option<usize> {
        let count = self.lapics.len();
        let start = self.turn.load(Ordering::Relaxed);
        let chosen = (0..count)
            .map(|step| (start + step) % count)
            .filter_map(|cpu| Some((self.lapics[cpu].arbitration(message)?, cpu)))
            .min_by_key(|candidate| candidate.0)?
            .1;
        self.turn.store((chosen + 1) % count, Ordering::Relaxed);
        Some(chosen)
    }

    fn send(&self, request: &Request) -> Delivery {
        let delivery = self.deliver(&request.message);
        if delivery == Delivery::Masked && request.message.level {
            self.ioapic.refused(request.pin);
        }
        delivery
    }

    fn send_all(&self, requests: Vec<Request>) {
        for request in requests {
            self.send(&request);
        }
    }

    /// The pair may have changed its request: LINT0 of vCPU 0 looks.
    fn pic_changed(&self) {
        self.lapics[0].look_at_lint0();
    }
}

/// The better of two outcomes.
fn best(a: Delivery, b: Delivery) -> Delivery {
    match (a, b) {
        (Delivery::Accepted, _) | (_, Delivery::Accepted) => Delivery::Accepted,
        (Delivery::Coalesced, _) | (_, Delivery::Coalesced) => Delivery::Coalesced,
        _ => Delivery::Masked,
    }
}

impl IrqChip for SoftIrqChip {
    /// Input 2 is the system timer, ISA interrupt 0 ([`ISA_OVERRIDES`]); `Gsi(0)` names it as well.
    fn set_line(&self, gsi: Gsi, level: bool) -> Delivery {
        let (irq, pin) = wiring(gsi);
        if self.is_raised_again(pin, level) {
            return Delivery::Coalesced;
        }
        let pic = irq.map_or(Delivery::Masked, |irq| {
            let delivery = self.pic.set_line(irq, level);
            self.pic_changed();
            delivery
        });
        let ioapic = match self.ioapic.set_line(pin, level) {
            Ok(request) => self.send(&request),
            Err(delivery) => delivery,
        };
        best(pic, ioapic)
    }

    fn signal_msi(&self, message: MsiMessage) -> Delivery {
        Message::from_msi(message).map_or(Delivery::Masked, |message| self.deliver(&message))
    }

    fn attach_ticks(&self, source: Weak<dyn TickSource>) -> Option<TickId> {
        self.ticks.attach(source)
    }

    fn tick_due(&self, id: TickId, point: Nanos) {
        self.ticks.set_due(id, self.lapics[0].slept_at(point));
        self.lapics[0].kick_vcpu();
    }

    fn tick_edge(&self, id: TickId, gsi: Gsi) -> Delivery {
        let (isa, pin) = wiring(gsi);
        let awaited = Awaited { vector: self.ioapic.vector(pin), isa };
        self.ticks.raise(id, awaited, || {
            let delivery = self.set_line(gsi, true);
            self.set_line(gsi, false);
            delivery
        })
    }

    fn tick_link(&self, id: TickId) -> TickLink {
        self.ticks.link(id)
    }

    fn set_tick_link(&self, id: TickId, link: TickLink) {
        self.ticks.set_link(id, link);
    }
}

impl std::fmt::Debug for SoftIrqChip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SoftIrqChip").field("cpus", &self.cpus()).finish_non_exhaustive()
    }
}

/// The vCPU's side of its local APIC.
struct Local {
    vcpu: usize,
    lapic: Arc<Lapic>,
    chip: Arc<SoftIrqChip>,
}

impl LocalInterrupts for Local {
    fn pending(&self) -> PendingEvents {
        if self.vcpu == 0 {
            self.chip.ticks.offer();
        }
        self.lapic.pending()
    }

    fn acknowledge(&self) -> Option<u8> {
        let ticks = &self.chip.ticks;
        match self.lapic.acknowledge() {
            Ok(vector) => {
                if vector.is_some() && ticks.any_raised() {
                    ticks.acknowledged(|awaited| awaited.vector == vector);
                }
                vector
            }
            Err(()) => {
                let vector = self.chip.pic.acknowledge();
                self.chip.pic_changed();
                if ticks.any_raised() {
                    let is = |isa: u8| self.chip.pic.vector(isa) == vector;
                    ticks.acknowledged(|awaited| awaited.isa.is_some_and(is));
                }
                Some(vector)
            }
        }
    }

    fn take_nmi(&self) -> bool {
        self.lapic.take_nmi()
    }

    fn take_init(&self) -> bool {
        self.lapic.take_init()
    }

    fn take_startup(&self) -> Option<u8> {
        self.lapic.take_startup()
    }

    fn cr8(&self) -> u8 {
        self.lapic.cr8()
    }

    fn set_cr8(&self, priority: u8) {
        self.lapic.set_cr8(priority);
    }

    fn apic_base(&self) -> u64 {
        self.lapic.apic_base()
    }

    fn attach(&self, kick: Arc<dyn Kick>) {
        self.lapic.attach(kick);
    }
}

/// The local APIC page: registers are 32 bits wide at multiples of 16.
struct LapicPage(Arc<SoftIrqChip>);

impl Device for LapicPage {
    fn name(&self) -> &str {
        "lapic"
    }

    fn read(&self, at: Access, data: &mut [u8]) {
        data.fill(0xff);
        let (register, byte) = ((at.offset >> 4) as u8, (at.offset & 15) as usize);
        let value = self.0.lapics.get(at.vcpu).and_then(|lapic| lapic.page_read(register));
        if let Some(value) = value {
            copy_out(value, byte, data);
        }
    }

    fn write(&self, at: Access, data: &[u8]) {
        let Some(lapic) = self.0.lapics.get(at.vcpu) else { return };
        if at.offset & 15 == 0
            && let Some(value) = data.first_chunk()
        {
            let effect = lapic.page_write((at.offset >> 4) as u8, u32::from_le_bytes(*value));
            self.0.perform(at.vcpu, effect);
        }
    }

    fn inspect(&self) -> Vec<(String, String)> {
        let of = |(cpu, lapic): (usize, &Arc<Lapic>)| {
            lapic.inspect().into_iter().map(move |(name, value)| (format!("cpu{cpu}.{name}"), value))
        };
        self.0.lapics.iter().enumerate().flat_map(of).collect()
    }
}

/// Bytes of a register from `byte` on; zero beyond it.
fn copy_out(value: u32, byte: usize, data: &mut [u8]) {
    let bytes = value.to_le_bytes();
    for (at, out) in data.iter_mut().enumerate() {
        *out = bytes.get(byte + at).copied().unwrap_or(0);
    }
}

/// The IOAPIC page.
struct IoapicPage(Arc<SoftIrqChip>);

impl Device for IoapicPage {
    fn name(&self) -> &str {
        "ioapic"
    }

    fn read(&self, at: Access, data: &mut [u8]) {
        let byte = (at.offset & 3) as usize;
        copy_out(self.0.ioapic.read(at.offset & !3), byte, data);
    }

    fn write(&self, at: Access, data: &[u8]) {
        let mut value = [0; 4];
        let len = data.len().min(4);
        value[..len].copy_from_slice(&data[..len]);
        // The select register may be written as a byte, the others only whole.
        if at.offset == 0 || len == 4 {
            let requests = self.0.ioapic.write(at.offset, u32::from_le_bytes(value));
            self.0.send_all(requests);
            self.0.ticks.retry();
        }
    }

    fn inspect(&self) -> Vec<(String, String)> {
        self.0.ioapic.inspect()
    }
}

/// Two neighbouring ports of the 8259 pair.
struct PicPorts {
    chip: Arc<SoftIrqChip>,
    ports: [Port; 2],
}

impl Device for PicPorts {
    fn name(&self) -> &str {
        "pic"
    }

    fn read(&self, at: Access, data: &mut [u8]) {
        for (byte, index) in data.iter_mut().zip(at.offset..) {
            *byte = self.ports.get(index as usize).map_or(0xff, |port| self.chip.pic.read(*port));
        }
        self.chip.pic_changed(); // a poll takes a request
    }

    fn write(&self, at: Access, data: &[u8]) {
        for (byte, index) in data.iter().zip(at.offset..) {
            if let Some(port) = self.ports.get(index as usize) {
                self.chip.pic.write(*port, *byte);
            }
        }
        self.chip.pic_changed();
        self.chip.ticks.retry();
    }

    fn inspect(&self) -> Vec<(String, String)> {
        self.chip.pic.inspect()
    }
}
