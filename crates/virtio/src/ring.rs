//! Rings and descriptor chains, read with suspicion (virtio 1.2, 2.7).

use std::sync::atomic::{Ordering, fence};

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::bitmap::ArcSlice;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};
use wardian_memory::{Gpa, GuestMemory, WriteTracker};

/// Descriptors in one chain; more than any queue's size, which is the specification's limit.
const MAX_DESCRIPTORS: usize = 1024;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT`.
const NO_INTERRUPT: u16 = 1;

/// A piece of guest RAM as DMA sees it: writes are told to the code caches.
pub(crate) type Slice<'a> = VolatileSlice<'a, ArcSlice<WriteTracker>>;

/// A ring that makes no sense; its queue is given up.
#[derive(Debug)]
pub(crate) struct Broken;

impl From<virtio_queue::Error> for Broken {
    fn from(_: virtio_queue::Error) -> Broken {
        Broken
    }
}

/// Buffers of one direction, in order. Addresses and lengths are the guest's and not yet checked; their sum
/// fits in 32 bits.
#[derive(Clone, Debug, Default)]
pub struct Buffers(Vec<(u64, u32)>);

impl Buffers {
    /// Bytes in all.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.iter().map(|(_, len)| u64::from(*len)).sum()
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Cuts off and returns the first `count` bytes. `None`, and nothing changes, if there are fewer.
    pub fn take_front(&mut self, count: u64) -> Option<Buffers> {
        if self.len() < count {
            return None;
        }
        let mut left = count as u32;
        let mut front = Vec::new();
        while left > 0 {
            let (at, len) = self.0[0];
            let step = left.min(len);
            front.push((at, step));
            if step == len {
                self.0.remove(0);
            } else {
                self.0[0] = (at.wrapping_add(u64::from(step)), len - step);
            }
            left -= step;
        }
        Some(Buffers(front))
    }

    /// Cuts off the last byte and returns its address.
    pub fn take_last_byte(&mut self) -> Option<Gpa> {
        while let Some((at, len)) = self.0.last_mut() {
            if *len == 0 {
                self.0.pop();
                continue;
            }
            *len -= 1;
            return Some(Gpa(at.wrapping_add(u64::from(*len))));
        }
        None
    }

    /// The guest RAM behind the buffers; `None` if a part of them is no RAM.
    pub(crate) fn slices<'a>(&self, mem: &'a GuestMemory) -> Option<Vec<Slice<'a>>> {
        let mut all = Vec::with_capacity(self.0.len());
        for (at, len) in &self.0 {
            for slice in mem.ram().get_slices(GuestAddress(*at), *len as usize) {
                all.push(slice.ok()?);
            }
        }
        Some(all)
    }

    /// Copies the first bytes to `out`, which must not be longer. Says whether they were all there and RAM.
    #[must_use]
    pub fn read(&self, mem: &GuestMemory, out: &mut [u8]) -> bool {
        let mut rest = out;
        for (at, len) in &self.0 {
            let (now, later) = rest.split_at_mut(rest.len().min(*len as usize));
            if !now.is_empty() && mem.read(Gpa(*at), now).is_err() {
                return false;
            }
            rest = later;
        }
        rest.is_empty()
    }

    /// Copies `data` into the buffers, as much as fits; returns how much did. Stops at what is no RAM.
    pub fn write(&self, mem: &GuestMemory, data: &[u8]) -> usize {
        let mut rest = data;
        for (at, len) in &self.0 {
            let (now, later) = rest.split_at(rest.len().min(*len as usize));
            if !now.is_empty() && mem.write(Gpa(*at), now).is_err() {
                break;
            }
            rest = later;
        }
        data.len() - rest.len()
    }
}

/// One request: a descriptor chain, sorted into what the device reads and what it writes.
#[derive(Clone, Debug)]
pub struct Chain {
    pub(crate) head: u16,
    /// What the driver says.
    pub readable: Buffers,
    /// Where the answer goes.
    pub writable: Buffers,
    /// Whether the chain obeys the specification: it ends, is not too long, and nothing readable comes
    /// after something writable. If not, the buffers are what was found until the mistake.
    pub valid: bool,
}

impl Chain {
    fn collect(head: u16, descriptors: impl Iterator<Item = Descriptor>) -> Chain {
        let (mut readable, mut writable) = (Buffers::default(), Buffers::default());
        let mut open = true;
        let mut ordered = true;
        for (count, descriptor) in descriptors.enumerate() {
            if count == MAX_DESCRIPTORS {
                open = true;
                break;
            }
            open = descriptor.has_next();
            let buffer = (descriptor.addr().raw_value(), descriptor.len());
            if descriptor.is_write_only() {
                writable.0.push(buffer);
            } else if writable.0.is_empty() {
                readable.0.push(buffer);
            } else {
                ordered = false;
                break;
            }
        }
        Chain { head, readable, writable, valid: ordered && !open }
    }
}

/// Where the driver put a queue, and how large it is.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Layout {
    pub size: u16,
    pub descriptors: u64,
    pub driver: u64,
    pub device: u64,
}

/// One live split ring.
pub(crate) struct Ring {
    queue: Queue,
    mem: GuestMemory,
    event_idx: bool,
}

impl Ring {
    /// The ring at `layout`.
    pub(crate) fn new(mem: &GuestMemory, layout: Layout, event_idx: bool) -> Result<Ring, Broken> {
        let mut queue = Queue::new(layout.size)?;
        queue.try_set_size(layout.size)?;
        queue.try_set_desc_table_address(GuestAddress(layout.descriptors))?;
        queue.try_set_avail_ring_address(GuestAddress(layout.driver))?;
        queue.try_set_used_ring_address(GuestAddress(layout.device))?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        if !queue.is_valid(mem.ram()) {
            return Err(Broken);
        }
        Ok(Ring { queue, mem: mem.clone(), event_idx })
    }

    /// The ring at `layout`, at `position` ([`Ring::position`]).
    pub(crate) fn resume(
        mem: &GuestMemory,
        layout: Layout,
        event_idx: bool,
        position: (u16, u16),
    ) -> Result<Ring, Broken> {
        let mut ring = Ring::new(mem, layout, event_idx)?;
        ring.queue.set_next_avail(position.0);
        ring.queue.set_next_used(position.1);
        Ok(ring)
    }

    /// The next request, if there is one.
    pub(crate) fn pop(&mut self) -> Result<Option<Chain>, Broken> {
        let chain = self.queue.iter(self.mem.ram())?.next();
        Ok(chain.map(|chain| Chain::collect(chain.head_index(), chain)))
    }

    /// Gives a request back, `written` bytes of its answer filled in.
    pub(crate) fn push(&mut self, head: u16, written: u32) -> Result<(), Broken> {
        Ok(self.queue.add_used(self.mem.ram(), head, written)?)
    }

    /// Whether the driver wants an interrupt for what was pushed since the last time.
    pub(crate) fn wants_interrupt(&mut self) -> Result<bool, Broken> {
        if self.event_idx {
            return Ok(self.queue.needs_notification(self.mem.ram())?);
        }
        // The used index must be out before the flag is read.
        fence(Ordering::SeqCst);
        let flags: u16 = self
            .mem
            .ram()
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map_err(|_| Broken)?;
        Ok(u16::from_le(flags) & NO_INTERRUPT == 0)
    }

    /// Tells the driver that notifications are of no use now.
    pub(crate) fn mute(&mut self) -> Result<(), Broken> {
        Ok(self.queue.disable_notification(self.mem.ram())?)
    }

    /// Asks for notifications again; true if requests came in meanwhile.
    pub(crate) fn unmute(&mut self) -> Result<bool, Broken> {
        Ok(self.queue.enable_notification(self.mem.ram())?)
    }

    /// Indexes of the next available and the next used entry.
    pub(crate) fn position(&self) -> (u16, u16) {
        (self.queue.next_avail(), self.queue.next_used())
    }
}
