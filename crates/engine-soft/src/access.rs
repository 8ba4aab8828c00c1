//! Memory accesses of helpers, and the slow path of translated code's own.

use iced_x86::{Instruction, Register};
use wardian_cpu::Exit;
use wardian_cpu::bits::{cr0, cr4, rflags};
use wardian_memory::Gpa;

use crate::core::{Core, Privilege, seg};
use crate::ctx::View;
use crate::mmu::{Translation, Want};
use crate::trap::{Result, Trap};

/// Access sizes by their code in a [`Site`].
pub const SIZES: [u16; 16] = [1, 2, 4, 8, 16, 32, 64, 10, 6, 28, 14, 108, 94, 512, 48, 3];

/// A memory access of translated code, packed above the 48 low bits of its instruction's linear address.
#[derive(Clone, Copy, Debug)]
pub struct Site(pub u64);

impl Site {
    /// Packs. `size` must be one of [`SIZES`].
    pub fn new(
        rip: u64,
        size: usize,
        read: bool,
        write: bool,
        segment: usize,
        checked: bool,
    ) -> Option<Site> {
        let code = SIZES.iter().position(|s| usize::from(*s) == size)? as u64;
        let bits = code
            | u64::from(write) << 4
            | u64::from(read) << 5
            | (segment as u64) << 6
            | u64::from(checked) << 9;
        Some(Site((rip & 0xffff_ffff_ffff) | bits << 48))
    }
    /// Linear address of the instruction.
    pub fn rip(self) -> u64 {
        ((self.0 << 16) as i64 >> 16) as u64
    }
    /// The same, of an instruction with a mask register: elements that are masked off do not fault.
    pub fn with_mask(self) -> Site {
        Site(self.0 | 1 << 62)
    }
    fn masked(self) -> bool {
        self.bits() & 0x4000 != 0
    }
    fn bits(self) -> u64 {
        self.0 >> 48
    }
    fn size(self) -> usize {
        usize::from(SIZES[(self.bits() & 15) as usize])
    }
    fn write(self) -> bool {
        self.bits() & 16 != 0
    }
    fn read(self) -> bool {
        self.bits() & 32 != 0
    }
    fn segment(self) -> usize {
        (self.bits() >> 6 & 7) as usize
    }
    /// The address is an offset: the segment's base, limit and type are still to be applied.
    fn checked(self) -> bool {
        self.bits() & 0x200 != 0
    }
}

/// What an instruction with a slow write leaves to be done after it.
#[derive(Clone, Copy, Debug)]
pub struct Commit {
    len: usize,
    /// Physical address of the first byte, and of the byte that starts the second page (if it crosses).
    gpa: [u64; 2],
    /// Bytes in the first page.
    first: usize,
    /// The data lies in the bounce buffer at this offset; `None`: it was written to RAM in place.
    bounce: Option<usize>,
    /// The bytes that the instruction writes, if it is masked (then `len` is at most 64).
    active: Option<u64>,
}

/// What the slow path decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Slow {
    /// R13 + R14 is the host address; go on.
    Hit = 0,
    /// R13 + R14 is the host address; run the instruction and then commit.
    Commit = 1,
    /// An exception was delivered: go on with the code at `Ctx::ret[0]`.
    Go = 2,
    /// Leave: [`Ctx::leave`](crate::ctx::Ctx) says why.
    Leave = 3,
}

/// Whether `linear` is canonical for 48-bit linear addresses.
pub fn is_canonical(linear: u64) -> bool {
    ((linear << 16) as i64 >> 16) as u64 == linear
}

impl Core {
    fn segment_fault(segment: usize) -> Trap {
        if segment == seg::SS { Trap::ss(0) } else { Trap::gp(0) }
    }

    /// Linear address of `offset` in segment register `segment` for an access of `len` bytes.
    ///
    /// # Errors
    /// #GP(0) or #SS(0) by the checks of Intel SDM vol. 3A, 6.3-6.5 (canonical form in 64-bit mode; limit, type
    /// and null selector elsewhere).
    pub fn linear(&mut self, segment: usize, offset: u64, len: usize, write: bool) -> Result<u64> {
        let last = (len as u64).saturating_sub(1);
        if self.is_64bit() {
            let base = if segment >= seg::FS { self.c().seg_base[segment] } else { 0 };
            let linear = base.wrapping_add(offset);
            if !is_canonical(linear) || !is_canonical(linear.wrapping_add(last)) {
                return Err(Self::segment_fault(segment));
            }
            return Ok(linear);
        }
        let offset = offset & 0xffff_ffff;
        let s = self.sys.segments[segment];
        let fault = || Self::segment_fault(segment);
        if self.protected() && !self.v86() {
            if s.unusable() {
                return Err(fault());
            }
            let code = s.rights & 8 != 0;
            let allowed = if write { !code && s.rights & 2 != 0 } else { !code || s.rights & 2 != 0 };
            if !allowed {
                return Err(fault());
            }
        }
        let expand_down = s.rights & 0xc == 4 && s.is_code_or_data() && self.protected();
        let end = offset + last;
        let limit = u64::from(s.limit);
        let inside = if expand_down {
            let top = if s.big() { 0xffff_ffff } else { 0xffff };
            offset > limit && end <= top
        } else {
            end <= limit
        };
        if !inside {
            return Err(fault());
        }
        Ok(self.c().seg_base[segment].wrapping_add(offset) & 0xffff_ffff)
    }

    /// Linear address of `insn`'s memory operand for an access of `size` bytes.
    ///
    /// # Errors
    /// As [`Core::linear`].
    pub fn operand_address(&mut self, insn: &Instruction, size: usize, write: bool) -> Result<u64> {
        let offset = self.operand_offset(insn);
        let segment = operand_segment(insn, self.is_64bit());
        self.linear(segment, offset, size, write)
    }

    /// Effective address (offset in its segment) of `insn`'s memory operand.
    pub fn operand_offset(&self, insn: &Instruction) -> u64 {
        let base = insn.memory_base();
        let index = insn.memory_index();
        if base == Register::RIP {
            return insn.memory_displacement64();
        }
        if base == Register::EIP {
            return insn.memory_displacement64() & 0xffff_ffff;
        }
        let value = |r: Register| {
            if r == Register::None { 0 } else { self.gpr(r.number()) & size_mask(r.size()) }
        };
        let sum = value(base)
            .wrapping_add(value(index).wrapping_mul(u64::from(insn.memory_index_scale())))
            .wrapping_add(insn.memory_displacement64());
        sum & size_mask(address_size(insn, self.is_64bit()))
    }

    /// Whether #AC is armed now.
    pub fn alignment_checked(&self) -> bool {
        self.sys.cpl == 3 && self.sys.cr0 & cr0::AM != 0 && self.c().rflags & rflags::AC != 0
    }

    fn note_watch(&mut self, linear: u64, len: usize, write: bool) {
        for (n, (start, length, on_read, on_write)) in self.watch.iter().enumerate() {
            let hit = linear < start.wrapping_add(*length) && *start < linear.wrapping_add(len as u64);
            if hit && if write { *on_write } else { *on_read } {
                self.watch_hit |= if n < 4 { 1 << n } else { 1 << 63 };
                self.watch_address = linear;
            }
        }
    }

    fn page_watched(&self, linear: u64) -> bool {
        let page = linear & !0xfff;
        self.watch
            .iter()
            .any(|(start, len, _, _)| *start < page.wrapping_add(4096) && page < start.wrapping_add(*len))
    }

    /// Host address of a span of plain RAM that may be accessed directly now; `None` when it must go through
    /// [`Core::read`] and [`Core::write`]. The span must not cross a page.
    ///
    /// # Errors
    /// #PF.
    pub fn host_span(
        &mut self,
        linear: u64,
        len: usize,
        write: bool,
        privilege: Privilege,
    ) -> Result<Option<*mut u8>> {
        if (linear & 0xfff) as usize + len > 4096 {
            return Ok(None);
        }
        let view = self.view_of(privilege);
        if let Some(host) = self.mmu.lookup(&self.ctx, view, linear, write) {
            return Ok(Some(host as *mut u8));
        }
        let t = self.walk(linear, if write { Want::Write } else { Want::Read }, privilege)?;
        let Some((page, host)) = self.mem.page(Gpa(t.gpa)) else { return Ok(None) };
        self.fill(view, linear, &t, (page, host));
        if (write && self.mem.code_marks(page) != 0) || (!self.watch.is_empty() && self.page_watched(linear))
        {
            return Ok(None);
        }
        Ok(Some((host + (t.gpa & 0xfff) as usize) as *mut u8))
    }

    /// The view by whose entries an access by `privilege` goes.
    #[inline]
    fn view_of(&self, privilege: Privilege) -> View {
        match privilege {
            Privilege::Current => self.view(),
            Privilege::Supervisor if self.sys.cr4 & cr4::SMAP != 0 => View::Kernel,
            Privilege::Supervisor => View::KernelUser,
        }
    }

    /// Remembers the translation `t` of `linear` to RAM, unless its page is watched.
    fn fill(&mut self, view: View, linear: u64, t: &Translation, found: (usize, usize)) {
        if !self.watch.is_empty() && self.page_watched(linear) {
            return;
        }
        let may_write = t.writable && self.mem.code_marks(found.0) == 0;
        if may_write && let Some(undo) = &mut self.undo {
            undo.keep(found.1);
        }
        self.mmu.fill(&mut self.ctx, view, linear, t, found, may_write);
        self.counters.tlb_misses += 1;
    }

    fn device_read(&mut self, gpa: u64, out: &mut [u8]) -> Result<()> {
        let mut at = 0;
        while at < out.len() {
            let size = piece(gpa + at as u64, out.len() - at);
            let value = self.ask(Exit::MmioRead { gpa: gpa + at as u64, size: size as u8 })?;
            out[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
            at += size;
        }
        Ok(())
    }

    fn device_write(&mut self, gpa: u64, data: &[u8]) {
        let mut at = 0;
        while at < data.len() {
            let size = piece(gpa + at as u64, data.len() - at);
            let mut bytes = [0u8; 8];
            bytes[..size].copy_from_slice(&data[at..at + size]);
            let data = u64::from_le_bytes(bytes);
            self.push_exit(Exit::MmioWrite { gpa: gpa + at as u64, size: size as u8, data });
            at += size;
        }
    }

    fn physical_read(&mut self, gpa: u64, out: &mut [u8]) -> Result<()> {
        match self.mem.page(Gpa(gpa)) {
            Some((_, host)) => {
                // SAFETY: the caller keeps the access within the page, which is live RAM; racing guest writes
                // only make the bytes read unspecified.
                unsafe {
                    std::ptr::copy_nonoverlapping(
                        (host + (gpa & 0xfff) as usize) as *const u8,
                        out.as_mut_ptr(),
                        out.len(),
                    );
                }
                Ok(())
            }
            None => self.device_read(gpa, out),
        }
    }

    fn physical_write(&mut self, gpa: u64, data: &[u8]) {
        match self.mem.page(Gpa(gpa)) {
            Some((page, host)) => {
                if let Some(undo) = &mut self.undo {
                    undo.keep(host);
                }
                // SAFETY: as in `physical_read`.
                unsafe {
                    std::ptr::copy_nonoverlapping(
                        data.as_ptr(),
                        (host + (gpa & 0xfff) as usize) as *mut u8,
                        data.len(),
                    );
                }
                if self.mem.code_marks(page) != 0 {
                    self.mem.stored(Gpa(gpa), data.len());
                }
            }
            None => self.device_write(gpa, data),
        }
    }

    /// Reads linear memory.
    ///
    /// # Errors
    /// #PF, or a question to the machine for device memory.
    pub fn read(&mut self, linear: u64, out: &mut [u8], privilege: Privilege) -> Result<()> {
        if !self.watch.is_empty() {
            self.note_watch(linear, out.len(), false);
        }
        let view = self.view_of(privilege);
        let mut at = 0;
        while at < out.len() {
            let here = self.wrap(linear, at);
            let len = (out.len() - at).min(4096 - (here & 0xfff) as usize);
            if let Some(host) = self.mmu.lookup(&self.ctx, view, here, false) {
                // SAFETY: a TLB entry leads to a live RAM page, in which the piece lies; racing guest writes only make
                // the bytes read unspecified.
                unsafe {
                    std::ptr::copy_nonoverlapping(host as *const u8, out[at..].as_mut_ptr(), len);
                }
                at += len;
                continue;
            }
            let t = self.walk(here, Want::Read, privilege)?;
            if let Some(found) = self.mem.page(Gpa(t.gpa)) {
                self.fill(view, here, &t, found);
            }
            self.physical_read(t.gpa, &mut out[at..at + len])?;
            at += len;
        }
        Ok(())
    }

    /// `linear + at`, wrapped as the mode has it.
    fn wrap(&self, linear: u64, at: usize) -> u64 {
        let sum = linear.wrapping_add(at as u64);
        if self.long_mode() { sum } else { sum & 0xffff_ffff }
    }

    /// Faults as a write of `len` bytes would.
    ///
    /// # Errors
    /// #PF.
    pub fn probe_write(&mut self, linear: u64, len: usize, privilege: Privilege) -> Result<()> {
        let mut at = 0;
        while at < len {
            let here = self.wrap(linear, at);
            self.walk(here, Want::Write, privilege)?;
            at += 4096 - (here & 0xfff) as usize;
        }
        Ok(())
    }

    /// Asks to be run again alone, unless it is so already or the `len` bytes at `linear` are not all RAM.
    ///
    /// # Errors
    /// [`Trap::Alone`], and #PF.
    pub fn need_alone(&mut self, linear: u64, len: usize) -> Result<()> {
        if self.alone {
            return Ok(());
        }
        for at in [linear, self.wrap(linear, len - 1)] {
            let t = self.walk(at, Want::Write, Privilege::Current)?;
            if self.mem.page(Gpa(t.gpa)).is_none() {
                return Ok(());
            }
        }
        Err(Trap::Alone)
    }

    /// Writes linear memory; checks every page before it writes the first byte.
    ///
    /// # Errors
    /// #PF.
    pub fn write(&mut self, linear: u64, data: &[u8], privilege: Privilege) -> Result<()> {
        if !self.watch.is_empty() {
            self.note_watch(linear, data.len(), true);
        }
        if (linear & 0xfff) as usize + data.len() > 4096 {
            self.probe_write(linear, data.len(), privilege)?;
        }
        let view = self.view_of(privilege);
        let mut at = 0;
        while at < data.len() {
            let here = self.wrap(linear, at);
            let len = (data.len() - at).min(4096 - (here & 0xfff) as usize);
            if let Some(host) = self.mmu.lookup(&self.ctx, view, here, true) {
                // SAFETY: as in `read`; a write entry exists only for pages without translated code.
                unsafe {
                    std::ptr::copy_nonoverlapping(data[at..].as_ptr(), host as *mut u8, len);
                }
                at += len;
                continue;
            }
            let t = self.walk(here, Want::Write, privilege)?;
            if let Some(found) = self.mem.page(Gpa(t.gpa)) {
                self.fill(view, here, &t, found);
            }
            self.physical_write(t.gpa, &data[at..at + len]);
            at += len;
        }
        Ok(())
    }

    /// The slow path of an access of translated code at `address` (effective or linear as the site says).
    pub fn slow_access(&mut self, address: u64, site: Site) -> Slow {
        self.counters.slow_accesses += 1;
        self.journal_used = 0;
        match self.try_slow(address, site) {
            Ok(slow) => {
                self.journal.clear();
                slow
            }
            Err(trap) => {
                let ctx = self.ctx.get_mut();
                ctx.rip = site.rip();
                ctx.budget += i64::from(ctx.left);
                match self.deliver_straight(trap) {
                    Ok(code) => {
                        self.ctx.get_mut().ret[0] = code;
                        Slow::Go
                    }
                    Err(leave) => {
                        self.ctx.get_mut().leave = leave as u32;
                        Slow::Leave
                    }
                }
            }
        }
    }

    fn try_slow(&mut self, address: u64, site: Site) -> Result<Slow> {
        let size = site.size();
        let (read, write) = (site.read(), site.write());
        if site.masked()
            && let Some(active) = crate::evex::active_bytes(self, site.rip(), size)
            && let Some(slow) = self.masked_slow(address, site, active)?
        {
            return Ok(slow);
        }
        let linear = if site.checked() {
            self.linear(site.segment(), address, size, write)?
        } else {
            if self.is_64bit()
                && !(is_canonical(address) && is_canonical(address.wrapping_add(size as u64 - 1)))
            {
                return Err(Self::segment_fault(site.segment()));
            }
            address
        };
        if self.alignment_checked() && size <= 8 && size.is_power_of_two() && linear & (size as u64 - 1) != 0
        {
            return Err(Trap::ac());
        }
        let want = if write { Want::Write } else { Want::Read };
        let first = size.min(4096 - (linear & 0xfff) as usize);
        let t = self.walk(linear, want, Privilege::Current)?;
        let watched = !self.watch.is_empty() && self.page_watched(linear);
        if first == size
            && let Some((page, host)) = self.mem.page(Gpa(t.gpa))
        {
            let offset = t.gpa & 0xfff;
            let ret = [offset, host as u64];
            let code = write && self.mem.code_marks(page) != 0;
            if !watched {
                let view = self.view();
                if !site.checked() && !self.alignment_checked() {
                    self.fill(view, linear, &t, (page, host));
                }
            } else {
                self.note_watch(linear, size, write);
            }
            self.ctx.get_mut().ret = ret;
            if code && let Some(undo) = &mut self.undo {
                undo.keep(host);
            }
            if code || self.watch_hit != 0 {
                // (In a watched mode reads, too, have what must follow a commit.)
                self.commit = Some(Commit {
                    len: if write { size } else { 0 },
                    gpa: [t.gpa, 0],
                    first,
                    bounce: None,
                    active: None,
                });
                return Ok(Slow::Commit);
            }
            return Ok(Slow::Hit);
        }
        // Device memory, or two pages: go through the bounce buffer.
        if watched {
            self.note_watch(linear, size, write);
        }
        let mut gpa = [t.gpa, 0];
        if first < size {
            gpa[1] = self.walk(self.wrap(linear, first), want, Privilege::Current)?.gpa;
            if read && write && !self.alone && gpa.iter().all(|gpa| self.mem.page(Gpa(*gpa)).is_some()) {
                return Err(Trap::Alone);
            }
        }
        let offset = (linear & 0xfff) as usize; // keeps the alignment; the buffer is two pages long
        let mut data = [0u8; 512];
        let data = &mut data[..size];
        let is_ram = |core: &Core, gpa: u64| core.mem.page(Gpa(gpa)).is_some();
        if read || is_ram(self, gpa[0]) {
            self.physical_read(gpa[0], &mut data[..first])?;
        }
        if first < size && (read || is_ram(self, gpa[1])) {
            self.physical_read(gpa[1], &mut data[first..])?;
        }
        let ctx = self.ctx.get_mut();
        ctx.bounce.0[offset..offset + size].copy_from_slice(data);
        ctx.ret = [offset as u64, std::ptr::addr_of!(ctx.bounce) as u64];
        if !write {
            if self.watch_hit != 0 {
                self.commit = Some(Commit { len: 0, gpa, first: 0, bounce: None, active: None });
                return Ok(Slow::Commit);
            }
            return Ok(Slow::Hit);
        }
        self.commit = Some(Commit { len: size, gpa, first, bounce: Some(offset), active: None });
        Ok(Slow::Commit)
    }

    /// The slow path of an access whose bytes other than `active` do not exist; `None` when there is nothing special
    /// about it. Within a page the fault is that of its first active byte.
    fn masked_slow(&mut self, address: u64, site: Site, active: u64) -> Result<Option<Slow>> {
        let (size, write) = (site.size(), site.write());
        let offset = (address & 0xfff) as usize;
        let nothing = |core: &mut Core| {
            let ctx = core.ctx.get_mut();
            ctx.ret = [offset as u64, std::ptr::addr_of!(ctx.bounce) as u64];
            Ok(Some(Slow::Hit))
        };
        if active == 0 {
            return nothing(self);
        }
        let (low, high) = (active.trailing_zeros() as usize, 63 - active.leading_zeros() as usize);
        let begin = address.wrapping_add(low as u64);
        let begin = if site.checked() {
            self.linear(site.segment(), begin, high - low + 1, write)?
        } else if self.is_64bit() && !(is_canonical(begin) && is_canonical(address.wrapping_add(high as u64)))
        {
            return Err(Self::segment_fault(site.segment()));
        } else {
            begin
        };
        let linear = self.wrap(begin, low.wrapping_neg());
        let offset = (linear & 0xfff) as usize;
        let want = if write { Want::Write } else { Want::Read };
        let first = size.min(4096 - offset);
        let below = if first >= 64 { u64::MAX } else { (1 << first) - 1 };
        let mut gpa = [0; 2];
        for (n, part) in [active & below, active & !below].into_iter().enumerate() {
            if part != 0 {
                // Where processors see the fault: vector stores into a second page at their last byte.
                let last = write && n == 1 && size > 8;
                let skip = u64::from(if last { 63 - part.leading_zeros() } else { part.trailing_zeros() });
                let t = self.walk(self.wrap(linear, skip as usize), want, Privilege::Current)?;
                gpa[n] = t.gpa + if n == 1 { first as u64 } else { 0 } - skip;
            }
        }
        if first == size && self.mem.page(Gpa(gpa[0])).is_some() {
            return Ok(None);
        }
        if !self.watch.is_empty() {
            self.note_watch(begin, high - low + 1, write);
        }
        let mut data = [0u8; 64];
        if site.read() && !write {
            for run in runs(active, first) {
                let at = if run.start < first {
                    gpa[0] + run.start as u64
                } else {
                    gpa[1] + (run.start - first) as u64
                };
                self.physical_read(at, &mut data[run])?;
            }
        }
        let ctx = self.ctx.get_mut();
        ctx.bounce.0[offset..offset + size].copy_from_slice(&data[..size]);
        ctx.ret = [offset as u64, std::ptr::addr_of!(ctx.bounce) as u64];
        if !write && self.watch_hit == 0 {
            return Ok(Some(Slow::Hit));
        }
        let active = if write { active } else { 0 };
        self.commit = Some(Commit { len: size, gpa, first, bounce: Some(offset), active: Some(active) });
        Ok(Some(Slow::Commit))
    }

    /// Finishes the write that [`Slow::Commit`] announced. Says whether translated code must be left.
    pub fn finish_write(&mut self) -> bool {
        let leave = self.commit_write();
        self.end_alone();
        leave
    }

    fn commit_write(&mut self) -> bool {
        let Some(commit) = self.commit.take() else { return false };
        match commit.bounce {
            None => self.mem.stored(Gpa(commit.gpa[0]), commit.len),
            Some(offset) => {
                let mut data = [0u8; 512];
                data[..commit.len].copy_from_slice(&self.c().bounce.0[offset..offset + commit.len]);
                if let Some(active) = commit.active {
                    let (first, gpa) = (commit.first, commit.gpa);
                    for run in runs(active, first) {
                        let start = run.start;
                        let at = if start < first {
                            gpa[0] + start as u64
                        } else {
                            gpa[1] + (start - first) as u64
                        };
                        self.physical_write(at, &data[run]);
                    }
                    return self.must_leave();
                }
                self.physical_write(commit.gpa[0], &data[..commit.first]);
                if commit.first < commit.len {
                    self.physical_write(commit.gpa[1], &data[commit.first..commit.len]);
                }
            }
        }
        self.must_leave()
    }

    fn must_leave(&self) -> bool {
        !self.out.is_empty()
            || self.watch_hit != 0
            || self.c().attention.load(std::sync::atomic::Ordering::Acquire) != 0
    }
}

macro_rules! scalar_reads {
    ($($read:ident $t:ty),*) => {
        impl Core {
            $(
                /// Reads a little-endian scalar.
                ///
                /// # Errors
                /// As [`Core::read`].
                pub fn $read(&mut self, linear: u64, privilege: Privilege) -> Result<$t> {
                    let mut bytes = [0u8; size_of::<$t>()];
                    self.read(linear, &mut bytes, privilege)?;
                    Ok(<$t>::from_le_bytes(bytes))
                }
            )*
        }
    };
}
scalar_reads!(read_u16 u16, read_u32 u32, read_u64 u64);

macro_rules! scalar_writes {
    ($($write:ident $t:ty),*) => {
        impl Core {
            $(
                /// Writes a little-endian scalar.
                ///
                /// # Errors
                /// As [`Core::write`].
                pub fn $write(&mut self, linear: u64, value: $t, privilege: Privilege) -> Result<()> {
                    self.write(linear, &value.to_le_bytes(), privilege)
                }
            )*
        }
    };
}
scalar_writes!(write_u8 u8, write_u16 u16);

/// The runs of set bits in `active`, split at bit `first`.
fn runs(active: u64, first: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let left = if at < 64 { active >> at << at } else { 0 };
        if left == 0 {
            return None;
        }
        let start = left.trailing_zeros() as usize;
        let end = (start + (left >> start).trailing_ones() as usize).min(64);
        at = if start < first { end.min(first) } else { end };
        Some(start..at)
    })
}

/// The largest naturally aligned device access at `gpa` within `left` bytes.
fn piece(gpa: u64, left: usize) -> usize {
    let mut size = 8;
    while size > left || !gpa.is_multiple_of(size as u64) {
        size /= 2;
    }
    size
}

/// All ones of `size` bytes.
pub fn size_mask(size: usize) -> u64 {
    if size >= 8 { u64::MAX } else { (1 << (size * 8)) - 1 }
}

/// Number (encoding order) of a segment register.
pub fn segment_number(register: Register) -> usize {
    match register {
        Register::ES => seg::ES,
        Register::CS => seg::CS,
        Register::SS => seg::SS,
        Register::FS => seg::FS,
        Register::GS => seg::GS,
        _ => seg::DS,
    }
}

/// Segment register of `insn`'s memory operand. In 64-bit mode overrides other than FS and GS do not count
/// (Intel SDM vol. 1, 3.7.4).
pub fn operand_segment(insn: &Instruction, code64: bool) -> usize {
    let segment = segment_number(insn.memory_segment());
    if !code64 || segment >= seg::FS {
        return segment;
    }
    match insn.memory_base() {
        Register::RSP | Register::ESP | Register::RBP | Register::EBP => seg::SS,
        _ => seg::DS,
    }
}

/// Address size of `insn`'s memory operand in bytes.
pub fn address_size(insn: &Instruction, code64: bool) -> usize {
    match (insn.memory_base(), insn.memory_index()) {
        (r, _) if r != Register::None && r != Register::RIP && r != Register::EIP => r.size(),
        (_, r) if r != Register::None => r.size(),
        (Register::EIP, _) => 4,
        _ if code64 => 8,
        _ => match insn.memory_displ_size() {
            2 => 2,
            _ => 4,
        },
    }
}
