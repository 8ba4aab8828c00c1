//! Puts a machine together, in its state after reset.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use wardian_backend::{Disk, DiskOptions, Output};
use wardian_boot::BootRequest;
use wardian_bus::pci::Function;
use wardian_bus::{Bus, Device};
use wardian_chipset::acpi::{self, AcpiConfig};
use wardian_chipset::debug::{DebugConsole, DebugExit, PostPort};
use wardian_chipset::doorbell::Doorbell;
use wardian_chipset::genid::GenerationId;
use wardian_chipset::hpet::{Hpet, LegacyRouting};
use wardian_chipset::i8042::I8042;
use wardian_chipset::irqchip::SoftIrqChip;
use wardian_chipset::layout;
use wardian_chipset::pci::PciRoot;
use wardian_chipset::pit::Pit;
use wardian_chipset::pm::Pm;
use wardian_chipset::power::PowerSink;
use wardian_chipset::rtc::{MemorySize, Rtc};
use wardian_chipset::serial::Serial;
use wardian_cpu::bits::msr;
use wardian_irq::{IrqChip, Kick, Line};
use wardian_memory::{Gpa, GuestMemory};
use wardian_time::{TimeBase, TimerQueue};
use wardian_virtio::PciTransport;

use crate::board::{Board, Msrs};
use crate::config::{Endpoint, Plan};
use crate::diary::Diary;
use crate::ending::Ending;
use crate::engine::{self, Chosen, EngineArgs};
use crate::error::MachineError;
use crate::host::{Input, InputRoute, Outputs};
use crate::operate::Buttons;
use crate::step::{StepMask, Stepped};
use crate::vcpu::Slot;
use crate::virtual_time;
use crate::vm::{Parts, Worker};

/// Most queues of a disk; one for each vCPU up to this.
const MAX_DISK_QUEUES: usize = 4;

/// The local APICs' registers as the board wants them.
struct ChipMsrs(Arc<SoftIrqChip>);

impl Msrs for ChipMsrs {
    fn read(&self, vcpu: usize, index: u32) -> Option<u64> {
        self.0.msr_read(vcpu, index).ok()
    }

    fn write(&self, vcpu: usize, index: u32, value: u64) -> bool {
        if index == msr::TSC_ADJUST {
            self.0.set_tsc_adjust(vcpu, value);
            return true;
        }
        self.0.msr_write(vcpu, index, value).is_ok()
    }
}

impl Worker for PciTransport {
    fn pause(&self) {
        PciTransport::pause(self);
    }

    fn resume(&self) {
        PciTransport::resume(self);
    }

    fn stop(&self) {
        PciTransport::stop(self);
    }
}

fn device_error(device: &str, source: impl std::error::Error + Send + Sync + 'static) -> MachineError {
    MachineError::Device { device: device.to_owned(), source: Box::new(source) }
}

/// The two address spaces while they are filled.
#[derive(Default)]
struct Spaces {
    ports: Bus,
    mmio: Bus,
}

impl Spaces {
    fn port(&mut self, range: Range<u64>, device: Arc<dyn Device>) -> Result<(), MachineError> {
        let name = device.name().to_owned();
        self.ports.map(range, device).map_err(|e| device_error(&name, e))
    }

    fn memory(&mut self, range: Range<u64>, device: Arc<dyn Device>) -> Result<(), MachineError> {
        let name = device.name().to_owned();
        self.mmio.map(range, device).map_err(|e| device_error(&name, e))
    }
}

/// What the devices share.
struct Shop<'a> {
    plan: &'a Plan,
    memory: &'a GuestMemory,
    queue: &'a Arc<TimerQueue>,
    chip: &'a Arc<SoftIrqChip>,
    power: Arc<dyn PowerSink>,
    keep: Vec<Box<dyn Any + Send + Sync>>,
    workers: Vec<Arc<dyn Worker>>,
    input: Option<Input>,
    button: Option<Arc<Pm>>,
}

impl Shop<'_> {
    fn irqs(&self) -> Arc<dyn IrqChip> {
        Arc::clone(self.chip) as _
    }

    fn line(&self, gsi: wardian_irq::Gsi) -> Line {
        Line::new(self.irqs(), gsi)
    }

    /// Interrupt chips, timers, clock, power.
    fn core(&mut self, spaces: &mut Spaces) -> Result<(), MachineError> {
        spaces.memory(layout::LAPIC, self.chip.lapic_device())?;
        spaces.memory(layout::IOAPIC, self.chip.ioapic_device())?;
        for (ports, device) in self.chip.pic_devices() {
            spaces.port(ports, device)?;
        }
        let routing = LegacyRouting::default();
        let timers = self.plan.timers;
        let pit = Pit::new(self.queue, routing.gate(self.line(layout::GSI_TIMER)), timers.pit);
        spaces.port(0x61..0x62, pit.port61())?;
        spaces.port(0x40..0x44, pit)?;
        spaces.memory(layout::HPET, Hpet::new(self.queue, &self.irqs(), routing.clone(), timers.hpet))?;
        let low = self.memory.size().min(layout::LOW_RAM_END);
        let size = MemorySize { low, high: self.memory.size() - low };
        let rtc = Rtc::new(self.queue, self.line(layout::GSI_RTC), size, routing, timers.rtc);
        spaces.port(layout::RTC_PORTS, rtc)?;
        let pm = Pm::new(self.queue, self.line(layout::GSI_SCI), Arc::clone(&self.power));
        let generation = GenerationId::new(self.memory, Arc::clone(&pm), generation_id(self.plan)?)?;
        self.keep.push(Box::new(generation));
        self.button = Some(Arc::clone(&pm));
        spaces.port(layout::PM_PORTS, pm)?;
        for (ports, device) in I8042::new(Arc::clone(&self.power)).ports() {
            spaces.port(ports, device)?;
        }
        Ok(())
    }

    /// Serial port and debug ports.
    fn characters(&mut self, spaces: &mut Spaces, outputs: &Outputs) -> Result<(), MachineError> {
        if self.plan.serial != Endpoint::None {
            let serial = Arc::new(Serial::new(Box::new(outputs.serial.clone()), self.line(layout::GSI_COM1)));
            if self.plan.serial == Endpoint::Stdio {
                let serial = Arc::clone(&serial);
                self.input = Some(Box::new(move |bytes| serial.push_input(bytes)));
            }
            spaces.port(layout::COM1_PORTS, serial)?;
        }
        spaces.port(layout::POST_PORT, Arc::new(PostPort::new()))?;
        if self.plan.debug_console != Endpoint::None {
            let console = DebugConsole::new(Box::new(outputs.debug.clone()));
            spaces.port(layout::DEBUG_CONSOLE, Arc::new(console))?;
        }
        if self.plan.debug_exit {
            spaces.port(layout::DEBUG_EXIT, Arc::new(DebugExit::new(Arc::clone(&self.power))))?;
        }
        if let Some(records) = &outputs.doorbell {
            let bell = Doorbell::new(Arc::clone(self.queue.base()), Box::new(records.clone()));
            spaces.port(layout::DOORBELL, Arc::new(bell))?;
        }
        Ok(())
    }

    fn add(&mut self, root: &PciRoot, device: Arc<PciTransport>) -> Result<(), MachineError> {
        self.workers.push(Arc::clone(&device) as _);
        let name = device.name().to_owned();
        root.add(device).map(drop).map_err(|e| device_error(&name, e))
    }

    /// The PCI bus and what is on it.
    fn pci(&mut self, spaces: &mut Spaces, disks: Vec<Disk>, console: &Output) -> Result<(), MachineError> {
        let root = PciRoot::new();
        let queues = self.plan.cpus.min(MAX_DISK_QUEUES);
        for disk in disks {
            let device = wardian_virtio::block(self.memory, self.irqs(), disk, queues, None);
            self.add(&root, device.map_err(|e| device_error("virtio-blk", e))?)?;
        }
        if self.plan.console != Endpoint::None {
            let made = wardian_virtio::console(self.memory, self.irqs(), console.clone(), None);
            let (device, input) = made.map_err(|e| device_error("virtio-console", e))?;
            if self.plan.console == Endpoint::Stdio {
                self.input = Some(Box::new(move |bytes| input.push(bytes)));
            }
            self.add(&root, device)?;
        }
        let entropy = wardian_virtio::entropy(self.memory, self.irqs(), None);
        self.add(&root, entropy.map_err(|e| device_error("virtio-rng", e))?)?;
        root.assign().map_err(|e| device_error("pci", e))?;
        let (ports, device) = root.ports(Arc::clone(&self.power));
        spaces.port(ports, device)?;
        for (range, device) in root.memory() {
            spaces.memory(range, device)?;
        }
        self.keep.push(Box::new(root));
        Ok(())
    }
}

/// A generation ID that no other machine has.
fn generation_id(plan: &Plan) -> Result<[u8; 16], MachineError> {
    let mut id = virtual_time::GENERATION_ID;
    if !plan.counted {
        let failed = |e: std::io::Error| MachineError::Host { what: "random bytes", source: e.into() };
        wardian_backend::entropy(&mut id).map_err(failed)?;
    }
    Ok(id)
}

/// Opens the disks of `plan`, in order.
pub(crate) fn open_disks(plan: &Plan) -> Result<Vec<Disk>, MachineError> {
    let open = |(number, disk): (usize, &crate::config::DiskArg)| {
        let options = DiskOptions { path: disk.path.clone(), format: disk.format, read_only: disk.readonly };
        Disk::open(&options).map_err(|source| MachineError::Disk { number, source })
    };
    plan.disks.iter().enumerate().map(open).collect()
}

/// Where outputs come from: opened at the first life, after everything that can be refused.
pub(crate) trait OutputSource: FnMut() -> Result<Outputs, MachineError> {}
impl<F: FnMut() -> Result<Outputs, MachineError>> OutputSource for F {}

/// A whole machine from `plan`.
pub(crate) fn assemble(
    plan: &Plan,
    chosen: Chosen,
    ending: &Arc<Ending>,
    mut outputs: impl OutputSource,
    route: &InputRoute,
    diary: &Arc<Diary>,
    held: bool,
) -> Result<Parts, MachineError> {
    // Input first: what can be refused is refused before anything is created.
    let memory = GuestMemory::new(plan.memory)?;
    let config = plan.timers.time_config(plan.tsc);
    let time = if plan.counted {
        TimeBase::counted(virtual_time::EPOCH, config)
    } else {
        TimeBase::host_with(config)
    };
    let queue = TimerQueue::new(Arc::clone(&time));
    let cpu = EngineArgs { chosen, memory: &memory, time: &time, cpus: plan.cpus, cpu: &plan.cpu };
    let (engine, model) = engine::make(&cpu)?;
    let tables = acpi::build(&AcpiConfig::new(plan.cpus as u32)).map_err(|e| device_error("acpi", e))?;
    let state = wardian_boot::load(
        &memory,
        &BootRequest {
            kernel: plan.kernel.clone(),
            initrd: plan.initrd.clone(),
            cmdline: plan.cmdline.clone(),
            modules: plan.modules.iter().map(|m| (m.path.clone(), m.cmdline.clone())).collect(),
            acpi_rsdp: Some(tables.rsdp_base),
            reserved: vec![layout::PCI_ECAM],
        },
    )?;
    for (base, bytes) in tables.blobs() {
        memory.write(Gpa(base), bytes)?;
    }
    let disks = open_disks(plan)?;
    let outputs = outputs()?;

    let chip = SoftIrqChip::with_ticks(plan.cpus, &queue, plan.timers.lapic);
    let mut slots = Vec::with_capacity(plan.cpus);
    for index in 0..plan.cpus {
        let local = chip.local(index).ok_or_else(|| MachineError::Host {
            what: "a local APIC",
            source: format!("there is none for vCPU {index}").into(),
        })?;
        let mask = StepMask::new(Arc::clone(&local));
        let mut vcpu = engine.create_vcpu(index, &model, Arc::clone(&mask) as _)?;
        if index == 0 {
            vcpu.set_state(&state)?;
            if let Some(out) = &outputs.interrupts {
                vcpu.on_taken(Some(virtual_time::trace(Arc::clone(&time), Box::new(out.clone()))));
            }
        }
        let slot = Slot::new(index, Box::new(Stepped { vcpu, mask }), Arc::clone(&local));
        local.attach(Arc::clone(&slot.wake) as Arc<dyn Kick>);
        slots.push(slot);
    }

    let mut spaces = Spaces::default();
    let mut shop = Shop {
        plan,
        memory: &memory,
        queue: &queue,
        chip: &chip,
        power: Arc::clone(ending) as _,
        keep: vec![Box::new(engine)],
        workers: Vec::new(),
        input: None,
        button: None,
    };
    shop.core(&mut spaces)?;
    shop.characters(&mut spaces, &outputs)?;
    shop.pci(&mut spaces, disks, &outputs.console)?;
    route.set(shop.input.take());
    let (keep, workers, button) = (shop.keep, shop.workers, shop.button);
    let buttons = Arc::new(Buttons {
        power: Box::new(move || button.iter().for_each(|pm| pm.press_power_button())),
        chip: Arc::clone(&chip) as _,
    });
    let board = Board { ports: spaces.ports, mmio: spaces.mmio, msrs: Arc::new(ChipMsrs(chip)) };
    Ok(Parts {
        name: plan.name.clone(),
        memory,
        queue,
        board,
        slots,
        workers,
        keep,
        held,
        diary: Arc::clone(diary),
        buttons,
        on_resume: plan.on_resume,
        lockup: plan.lockup,
    })
}
