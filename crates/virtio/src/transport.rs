//! The registers of a modern virtio PCI device (virtio 1.2, 4.1).

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use wardian_bus::pci::{ConfigError, ConfigSpace, Function, Identity, MappedBar, MsiX};
use wardian_irq::IrqChip;
use wardian_memory::GuestMemory;

use crate::device::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
use crate::ring::{Layout, Ring};
use crate::worker::{Active, Bell, NO_VECTOR, Shared, Slot};
use crate::{VirtioDevice, VirtioError, VirtioState};

const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;
const VENDOR_CAPABILITY: u8 = 0x09;

/// The one BAR, 64 bits wide, and what lies where in it, a page each.
const BAR: usize = 0;
pub(crate) const BAR_LEN: u64 = 0x8000;
const PAGE: u64 = 0x1000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
pub(crate) const TABLE: u64 = 0x4000;
pub(crate) const PENDING: u64 = 0x5000;
const COMMON_LEN: usize = 0x40;
/// Bytes between the doorbells of two queues.
const NOTIFY_STEP: u32 = 4;

/// Device status bits (2.1).
const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;
const STATUS_NEEDS_RESET: u8 = 64;

#[derive(Clone, Copy)]
pub(crate) struct QueueRegisters {
    pub(crate) layout: Layout,
    pub(crate) enabled: bool,
}

pub(crate) struct Registers {
    pub(crate) pci: ConfigSpace,
    pub(crate) device_feature_select: u32,
    pub(crate) driver_feature_select: u32,
    pub(crate) driver_features: u64,
    pub(crate) status: u8,
    /// The status before a reset that the workers have yet to see, or 0.
    pub(crate) resetting: u8,
    pub(crate) queue_select: u16,
    pub(crate) queues: Vec<QueueRegisters>,
}

/// One virtio device as a PCI function: registers here, a worker thread for each queue.
///
/// Lock order: the registers, then a worker's mailbox; MSI-X and the interrupt chip are called without the
/// registers locked, but for `DEVICE_NEEDS_RESET`.
pub struct PciTransport {
    pub(crate) shared: Arc<Shared>,
    pub(crate) registers: Mutex<Registers>,
    pub(crate) features: u64,
    pub(crate) max_sizes: Vec<u16>,
    /// Offset of the message control word of MSI-X.
    pub(crate) msix_control: usize,
    /// Offset of the configuration access capability (4.1.4.9).
    window: usize,
    workers: Vec<JoinHandle<()>>,
}

fn layout(device: &dyn VirtioDevice, msix: &MsiX) -> Result<(ConfigSpace, usize, usize), ConfigError> {
    let id = FIRST_DEVICE + device.device_type();
    let mut pci = ConfigSpace::new(&Identity {
        vendor: VENDOR,
        device: id,
        subsystem_vendor: VENDOR,
        subsystem: id,
        class: device.class(),
        revision: 1,
    });
    pci.add_bar64(BAR, BAR_LEN, false)?;
    let (id, body, writable) = msix.capability(BAR as u8, TABLE as u32, PENDING as u32);
    let msix_control = pci.add_capability(id, &body, &writable)? + 2;
    let mut structure = |kind: u8, offset: u64, len: usize, more: &[u8], writable: &[u8]| {
        let mut body = vec![16 + more.len() as u8, kind, BAR as u8, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend((len as u32).to_le_bytes());
        body.extend(more);
        pci.add_capability(VENDOR_CAPABILITY, &body, writable)
    };
    structure(1, COMMON, COMMON_LEN, &[], &[])?;
    structure(2, NOTIFY, PAGE as usize, &NOTIFY_STEP.to_le_bytes(), &[])?;
    structure(3, ISR, 1, &[], &[])?;
    if !device.config().is_empty() {
        structure(4, DEVICE, device.config().len(), &[], &[])?;
    }
    // The window's BAR, offset, length and data are the driver's to write.
    let mut writable = [0xff; 18];
    writable[..2].fill(0);
    writable[3..6].fill(0);
    let window = structure(5, 0, 0, &[0; 4], &writable)?;
    Ok((pci, msix_control, window))
}

impl PciTransport {
    /// The transport of `device`, with its workers running and nothing to do.
    ///
    /// # Errors
    /// [`VirtioError`].
    pub fn start(
        mem: &GuestMemory,
        chip: Arc<dyn IrqChip>,
        device: Arc<dyn VirtioDevice>,
    ) -> Result<Arc<PciTransport>, VirtioError> {
        Self::build(mem, chip, device, None)
    }

    /// The transport of `device` that was saved as `state`, paused: [`PciTransport::resume`] lets the workers go, which
    /// look at every ring then.
    ///
    /// # Errors
    /// [`VirtioError::State`] and what else [`PciTransport::start`] says.
    pub fn restore(
        mem: &GuestMemory,
        chip: Arc<dyn IrqChip>,
        device: Arc<dyn VirtioDevice>,
        state: &VirtioState,
    ) -> Result<Arc<PciTransport>, VirtioError> {
        Self::build(mem, chip, device, Some(state))
    }

    fn build(
        mem: &GuestMemory,
        chip: Arc<dyn IrqChip>,
        device: Arc<dyn VirtioDevice>,
        state: Option<&VirtioState>,
    ) -> Result<Arc<PciTransport>, VirtioError> {
        let max_sizes = device.queue_sizes();
        let msix = MsiX::new(chip, max_sizes.len() as u16 + 1);
        let (pci, msix_control, window) = layout(&*device, &msix)
            .map_err(|source| VirtioError::Layout { name: device.name().into(), source })?;
        let slots: Vec<Arc<Slot>> = max_sizes.iter().map(|_| Arc::default()).collect();
        for slot in &slots {
            slot.vector.store(NO_VECTOR, Ordering::Release);
        }
        device.attach(slots.iter().map(Bell::new).collect());
        let features = device.features() | F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1;
        let shared = Arc::new(Shared {
            device,
            mem: mem.clone(),
            msix,
            slots,
            config_vector: AtomicU16::new(NO_VECTOR),
            isr: AtomicU8::new(0),
            broken: AtomicBool::new(false),
        });
        let registers = Registers {
            pci,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            status: 0,
            resetting: 0,
            queue_select: 0,
            queues: fresh_queues(&max_sizes),
        };
        let mut transport = PciTransport {
            shared,
            registers: Mutex::new(registers),
            features,
            max_sizes,
            msix_control,
            window,
            workers: Vec::new(),
        };
        if let Some(state) = state {
            transport.begin_pause();
            transport.load(state)?;
        }
        for queue in 0..transport.max_sizes.len() {
            let shared = Arc::clone(&transport.shared);
            let name = format!("{}:{queue}", shared.device.name());
            let worker = std::thread::Builder::new()
                .name(name.trim_start_matches("virtio-").chars().take(15).collect())
                .spawn(move || shared.work(queue))
                .map_err(|source| VirtioError::Worker { name, source })?;
            transport.workers.push(worker);
        }
        if state.is_some() {
            transport.pause();
        }
        Ok(Arc::new(transport))
    }

    pub(crate) fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks every worker to stop after the request at hand. Does not wait.
    pub fn begin_pause(&self) {
        for slot in &self.shared.slots {
            slot.pause();
        }
    }

    /// [`PciTransport::begin_pause`], and waits until all have stopped. No request is in flight then, and
    /// guest memory is not written.
    pub fn pause(&self) {
        self.begin_pause();
        for slot in &self.shared.slots {
            slot.wait_parked();
        }
    }

    /// Ends a pause; the workers look at their rings again.
    pub fn resume(&self) {
        for slot in &self.shared.slots {
            slot.resume();
        }
    }

    /// Makes durable what the guest wrote.
    pub fn flush(&self) {
        self.shared.device.flush();
    }

    /// Pauses for good and makes durable what the guest wrote, whoever else still holds the device.
    pub fn stop(&self) {
        self.pause();
        self.shared.device.flush();
    }

    /// Back to power-on, as a machine reset does; returns when every worker has let go of its ring. Not
    /// for a vCPU thread, nor while paused.
    pub fn reset(&self) {
        let mut registers = self.registers();
        self.reset_device(&mut registers);
        for offset in [0x04, 0x0c] {
            registers.pci.write(offset, &[0; 2]);
        }
        for offset in (0x10..0x28).step_by(4) {
            registers.pci.write(offset, &[0; 4]);
        }
        registers.pci.write(0x3c, &[0]);
        registers.pci.write(self.msix_control, &[0; 2]);
        registers.pci.write(self.window, &[0; 20]);
        drop(registers);
        self.shared.msix.reset();
        for slot in &self.shared.slots {
            slot.wait_reset();
        }
    }

    /// The driver's reset: the registers at once, the workers when they get to it.
    fn reset_device(&self, registers: &mut Registers) {
        if registers.resetting == 0 {
            registers.resetting = self.status(registers);
        }
        registers.status = 0;
        registers.driver_features = 0;
        registers.device_feature_select = 0;
        registers.driver_feature_select = 0;
        registers.queue_select = 0;
        registers.queues = fresh_queues(&self.max_sizes);
        for slot in &self.shared.slots {
            slot.reset();
        }
        self.shared.config_vector.store(NO_VECTOR, Ordering::Release);
        self.shared.isr.store(0, Ordering::Release);
        self.shared.broken.store(false, Ordering::Release);
    }

    fn status(&self, registers: &Registers) -> u8 {
        let broken = self.shared.broken.load(Ordering::Acquire);
        registers.status | if broken { STATUS_NEEDS_RESET } else { 0 }
    }

    /// The status as the driver reads it: not 0 before a reset is done (2.4.1).
    fn read_status(&self, registers: &mut Registers) -> u8 {
        if registers.resetting != 0 {
            if !self.shared.slots.iter().all(|slot| slot.reset_done()) {
                return registers.resetting;
            }
            registers.resetting = 0;
            // Whatever an old ring did until its worker let go of it.
            self.shared.broken.store(false, Ordering::Release);
        }
        self.status(registers)
    }

    fn write_status(&self, registers: &mut Registers, value: u8) {
        if value == 0 {
            self.reset_device(registers);
            return;
        }
        registers.resetting = 0;
        let set = value & !registers.status;
        registers.status |= value & !STATUS_NEEDS_RESET;
        if set & STATUS_FEATURES_OK != 0 {
            let taken = registers.driver_features;
            if taken & !self.features != 0 || taken & F_VERSION_1 == 0 {
                registers.status &= !STATUS_FEATURES_OK;
            }
        }
        if set & STATUS_DRIVER_OK != 0 {
            for queue in 0..registers.queues.len() {
                self.activate(registers, queue);
            }
        }
    }

    /// Gives the worker its ring, once the queue is enabled and the driver is there.
    fn activate(&self, registers: &Registers, queue: usize) {
        let ready = STATUS_DRIVER_OK | STATUS_FEATURES_OK;
        let QueueRegisters { layout, enabled } = registers.queues[queue];
        if !enabled || registers.status & ready != ready {
            return;
        }
        let features = registers.driver_features;
        match Ring::new(&self.shared.mem, layout, features & F_EVENT_IDX != 0) {
            Ok(ring) => self.shared.slots[queue].activate(Active { ring, features }),
            Err(_) => self.shared.break_down(queue),
        }
    }

    fn common_read(&self, offset: u64, data: &mut [u8]) {
        let mut registers = self.registers();
        let status = self.read_status(&mut registers);
        let mut bytes = [0u8; COMMON_LEN];
        let mut set = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        let half = |features: u64, select: u32| match select {
            0 => (features as u32).to_le_bytes(),
            1 => ((features >> 32) as u32).to_le_bytes(),
            _ => [0; 4],
        };
        let vector = |vector: &AtomicU16| vector.load(Ordering::Acquire).to_le_bytes();
        set(0x00, &registers.device_feature_select.to_le_bytes());
        set(0x04, &half(self.features, registers.device_feature_select));
        set(0x08, &registers.driver_feature_select.to_le_bytes());
        set(0x0c, &half(registers.driver_features, registers.driver_feature_select));
        set(0x10, &vector(&self.shared.config_vector));
        set(0x12, &(registers.queues.len() as u16).to_le_bytes());
        set(0x14, &[status, 0]);
        set(0x16, &registers.queue_select.to_le_bytes());
        let select = usize::from(registers.queue_select);
        if let Some(QueueRegisters { layout, enabled }) = registers.queues.get(select) {
            set(0x18, &layout.size.to_le_bytes());
            set(0x1a, &vector(&self.shared.slots[select].vector));
            set(0x1c, &[u8::from(*enabled)]);
            set(0x1e, &registers.queue_select.to_le_bytes());
            set(0x20, &layout.descriptors.to_le_bytes());
            set(0x28, &layout.driver.to_le_bytes());
            set(0x30, &layout.device.to_le_bytes());
            set(0x38, &registers.queue_select.to_le_bytes());
        }
        copy_out(&bytes, offset, data);
    }

    fn common_write(&self, offset: u64, data: &[u8]) {
        let value = data.iter().rev().fold(0u64, |all, byte| all << 8 | u64::from(*byte));
        let mut guard = self.registers();
        let registers = &mut *guard;
        let vector = |value: u64| {
            if value < u64::from(self.shared.msix.vectors()) { value as u16 } else { NO_VECTOR }
        };
        match (offset, data.len()) {
            (0x00, 4) => registers.device_feature_select = value as u32,
            (0x08, 4) => registers.driver_feature_select = value as u32,
            (0x0c, 4) if registers.status & STATUS_FEATURES_OK == 0 => {
                let (keep, new) = match registers.driver_feature_select {
                    0 => (!0 << 32, value),
                    1 => (0xffff_ffff, value << 32),
                    _ => return,
                };
                registers.driver_features = registers.driver_features & keep | new;
            }
            (0x10, 2) => self.shared.config_vector.store(vector(value), Ordering::Release),
            (0x14, 1) => self.write_status(registers, value as u8),
            (0x16, 2) => registers.queue_select = value as u16,
            (0x1a, 2) => {
                if let Some(slot) = self.shared.slots.get(usize::from(registers.queue_select)) {
                    slot.vector.store(vector(value), Ordering::Release);
                }
            }
            (0x1c, 2) if value == 1 => {
                let select = usize::from(registers.queue_select);
                let Some(queue) = registers.queues.get_mut(select) else { return };
                if !std::mem::replace(&mut queue.enabled, true) {
                    self.activate(registers, select);
                }
            }
            _ => {
                let select = usize::from(registers.queue_select);
                let max = self.max_sizes.get(select).copied().unwrap_or(0);
                let Some(queue) = registers.queues.get_mut(select) else { return };
                if queue.enabled {
                    return;
                }
                let layout = &mut queue.layout;
                match (offset, data.len()) {
                    (0x18, 2) if value <= u64::from(max) && (value as u16).is_power_of_two() => {
                        layout.size = value as u16;
                    }
                    (0x20 | 0x24, 4) | (0x20, 8) => merge(&mut layout.descriptors, offset, data),
                    (0x28 | 0x2c, 4) | (0x28, 8) => merge(&mut layout.driver, offset, data),
                    (0x30 | 0x34, 4) | (0x30, 8) => merge(&mut layout.device, offset, data),
                    _ => {}
                }
            }
        }
    }

    /// Where the window of the configuration access capability points: offset and length, if it makes
    /// sense and `offset` and `len` touch its data.
    fn window(&self, offset: usize, len: usize) -> Option<(u64, usize)> {
        let data = self.window + 16;
        if offset >= data + 4 || offset + len <= data {
            return None;
        }
        let registers = self.registers();
        let bar = registers.pci.dword(self.window + 4) & 0xff;
        let at = registers.pci.dword(self.window + 8);
        let size = registers.pci.dword(self.window + 12);
        (bar == BAR as u32 && matches!(size, 1 | 2 | 4) && at.is_multiple_of(size))
            .then_some((u64::from(at), size as usize))
    }
}

fn fresh_queues(max_sizes: &[u16]) -> Vec<QueueRegisters> {
    let fresh =
        |size: &u16| QueueRegisters { layout: Layout { size: *size, ..Layout::default() }, enabled: false };
    max_sizes.iter().map(fresh).collect()
}

/// Copies from a block of registers; zeros outside of it.
fn copy_out(bytes: &[u8], offset: u64, data: &mut [u8]) {
    let offset = usize::try_from(offset).unwrap_or(usize::MAX);
    for (n, byte) in data.iter_mut().enumerate() {
        *byte = bytes.get(offset.saturating_add(n)).copied().unwrap_or(0);
    }
}

/// Writes one half or all of a 64-bit register.
fn merge(register: &mut u64, offset: u64, data: &[u8]) {
    let mut bytes = register.to_le_bytes();
    bytes[offset as usize % 8..][..data.len()].copy_from_slice(data);
    *register = u64::from_le_bytes(bytes);
}

impl Function for PciTransport {
    fn name(&self) -> &str {
        self.shared.device.name()
    }

    fn config_read(&self, offset: usize, data: &mut [u8]) {
        if let Some((at, size)) = self.window(offset, data.len()) {
            let mut bytes = [0; 4];
            self.bar_read(BAR, at, &mut bytes[..size]);
            self.registers().pci.set(self.window + 16, &bytes);
        }
        self.registers().pci.read(offset, data);
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        let control = {
            let mut registers = self.registers();
            registers.pci.write(offset, data);
            registers.pci.word(self.msix_control)
        };
        if offset < self.msix_control + 2 && offset + data.len() > self.msix_control {
            self.shared.msix.set_control(control);
        }
        if let Some((at, size)) = self.window(offset, data.len()) {
            let bytes = self.registers().pci.dword(self.window + 16).to_le_bytes();
            self.bar_write(BAR, at, &bytes[..size]);
        }
    }

    fn mapped_bars(&self) -> Vec<MappedBar> {
        self.registers().pci.mapped_bars()
    }

    fn bar_sizes(&self) -> Vec<(usize, u64)> {
        self.registers().pci.bar_sizes()
    }

    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if bar != BAR {
            return;
        }
        let within = offset % PAGE;
        match offset - within {
            COMMON => self.common_read(within, data),
            ISR if within == 0 => data[0] = self.shared.isr.swap(0, Ordering::AcqRel),
            DEVICE => copy_out(self.shared.device.config(), within, data),
            TABLE => self.shared.msix.table_read(within, data),
            PENDING => self.shared.msix.pending_read(within, data),
            _ => {}
        }
    }

    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
        if bar != BAR {
            return;
        }
        let within = offset % PAGE;
        match offset - within {
            NOTIFY => {
                let queue = usize::try_from(within / u64::from(NOTIFY_STEP)).unwrap_or(usize::MAX);
                if let Some(slot) = self.shared.slots.get(queue) {
                    slot.kick();
                }
            }
            COMMON => self.common_write(within, data),
            TABLE => self.shared.msix.table_write(within, data),
            _ => {}
        }
    }

    fn inspect(&self) -> Vec<(String, String)> {
        let registers = self.registers();
        let mut all = vec![
            ("status".to_owned(), format!("{:#04x}", self.status(&registers))),
            ("features".to_owned(), format!("{:#x}", registers.driver_features)),
            ("msix".to_owned(), format!("{:?}", self.shared.msix)),
        ];
        for (n, (queue, slot)) in registers.queues.iter().zip(&self.shared.slots).enumerate() {
            let state = if queue.enabled { "enabled" } else { "off" };
            let at =
                slot.position().map_or(String::new(), |(avail, used)| format!(" avail {avail} used {used}"));
            all.push((format!("queue{n}"), format!("{state} size {}{at}", queue.layout.size)));
        }
        all
    }
}

impl Drop for PciTransport {
    fn drop(&mut self) {
        for slot in &self.shared.slots {
            slot.quit();
        }
        for worker in self.workers.drain(..) {
            if worker.join().is_err() {
                tracing::error!("A worker of {} panicked", self.shared.device.name());
            }
        }
    }
}

impl std::fmt::Debug for PciTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PciTransport").field("name", &self.shared.device.name()).finish_non_exhaustive()
    }
}
