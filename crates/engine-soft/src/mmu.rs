//! Paging: the page walk, the software TLB that translated code probes, and the fetch TLB.
//!
//! Source: Intel SDM vol. 3A, chapter 5. Walks set accessed and dirty bits by compare-exchange, check reserved
//! bits, and honour NX, WP, SMEP, SMAP and the page-size bits in 32-bit, PAE and 4-level paging.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use wardian_cpu::bits::{cr0, cr4, efer};
use wardian_memory::{Gpa, GuestMemory};

use crate::core::{Core, Privilege};
use crate::ctx::{self, CtxBox, JUMP_ENTRIES, TLB_ENTRIES, VIEWS, View};
use crate::trap::{Result, Trap};

/// What to forget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// Everything, global translations too.
    All,
    /// Everything but global translations.
    NonGlobal,
    /// The translations of one linear page.
    Page(u64),
}

/// What an access wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// Data read.
    Read,
    /// Data write.
    Write,
    /// Instruction fetch.
    Fetch,
}

/// Where a linear page lies.
#[derive(Clone, Copy, Debug)]
pub struct Translation {
    /// Physical address of the byte.
    pub gpa: u64,
    /// Writes are allowed and the dirty bit is set.
    pub writable: bool,
    /// Survives a flush of non-global translations.
    pub global: bool,
    /// Mapped by a page larger than 4 KiB.
    pub large: bool,
}

/// A fetch translation: RAM page and host address.
#[derive(Clone, Copy, Debug, Default)]
pub struct FetchPage {
    tag: u64,
    epoch: u64,
    /// Number of the RAM page.
    pub page: usize,
    /// Host address of its first byte.
    pub host: usize,
    /// Global translation.
    pub global: bool,
}

const FETCH_ENTRIES: usize = 1024;
const LOG_LIMIT: usize = 1 << 18;
const BLOOM: usize = 4096;

/// Book-keeping of one vCPU's TLB.
pub struct Mmu {
    /// Filled indices by view: non-global, global.
    log: [[Vec<u32>; 2]; VIEWS],
    jump_log: [[Vec<u16>; 2]; VIEWS],
    /// Linear pages (hashed) with slots in any jump cache.
    jump_bloom: [u64; BLOOM / 64],
    /// Address of the thunk that empty jump-cache slots lead to.
    jump_miss: u64,
    fetch: Box<[FetchPage]>,
    epoch: u64,
    /// RAM pages that may have live write entries.
    write_seen: Vec<u64>,
    /// Linear ranges covered by large pages since the last flush: lower half, upper half.
    large: [(u64, u64); 2],
}

/// The value that never matches a probe of slot `index`.
fn invalid(index: usize) -> u64 {
    if index == 0 { 1 << 12 } else { 0 }
}

impl Mmu {
    /// Empties `ctx`'s tables; `jump_miss` is where an empty jump slot leads.
    pub fn new(ctx: &mut CtxBox, mem: &GuestMemory, jump_miss: u64) -> Mmu {
        let mut mmu = Mmu {
            log: Default::default(),
            jump_log: Default::default(),
            jump_bloom: [0; BLOOM / 64],
            jump_miss,
            fetch: vec![FetchPage::default(); FETCH_ENTRIES].into_boxed_slice(),
            epoch: 1,
            write_seen: vec![0; (mem.size() / 4096).div_ceil(64) as usize],
            large: [(u64::MAX, 0); 2],
        };
        for view in [View::User, View::Kernel, View::KernelUser] {
            ctx.store(ctx::tag_read(view), 0, invalid(0));
            ctx.store(ctx::tag_write(view), 0, invalid(0));
            for slot in 0..JUMP_ENTRIES {
                ctx.store(ctx::jumps(view), slot, jump_miss);
            }
        }
        mmu.log[0][0].reserve(4096);
        mmu
    }

    fn index(linear: u64) -> usize {
        (linear >> 12) as usize & (TLB_ENTRIES - 1)
    }

    /// The host address of `linear`, if `view` has an entry for such an access.
    #[inline]
    pub fn lookup(&self, ctx: &CtxBox, view: View, linear: u64, write: bool) -> Option<usize> {
        let index = Self::index(linear);
        let table = if write { ctx::tag_write(view) } else { ctx::tag_read(view) };
        (ctx.load(table, index) == linear & !0xfff)
            .then(|| (ctx.load(ctx::addend(view), index) + (linear & 0xfff)) as usize)
    }

    fn drop_entry(ctx: &mut CtxBox, view: View, index: usize) {
        ctx.store(ctx::tag_read(view), index, invalid(index));
        ctx.store(ctx::tag_write(view), index, invalid(index));
    }

    fn flush_log(&mut self, ctx: &mut CtxBox, view: View, global: usize) {
        let log = &mut self.log[view as usize][global];
        for index in log.drain(..) {
            Self::drop_entry(ctx, view, index as usize);
        }
    }

    fn flush_jumps(&mut self, ctx: &mut CtxBox, view: View, global: usize) {
        let miss = self.jump_miss;
        for slot in self.jump_log[view as usize][global].drain(..) {
            ctx.store(ctx::jumps(view), slot as usize, miss);
        }
    }

    const ALL_VIEWS: [View; VIEWS] = [View::User, View::Kernel, View::KernelUser];

    /// Forgets.
    pub fn flush(&mut self, ctx: &mut CtxBox, what: Flush) {
        self.epoch += 1;
        match what {
            Flush::All => {
                for view in Self::ALL_VIEWS {
                    for global in 0..2 {
                        self.flush_log(ctx, view, global);
                        self.flush_jumps(ctx, view, global);
                    }
                }
                self.jump_bloom = [0; BLOOM / 64];
                self.large = [(u64::MAX, 0); 2];
            }
            Flush::NonGlobal => {
                for view in Self::ALL_VIEWS {
                    self.flush_log(ctx, view, 0);
                    self.flush_jumps(ctx, view, 0);
                }
                self.large[0] = (u64::MAX, 0);
            }
            Flush::Page(linear) => {
                let half = &self.large[(linear >> 63) as usize];
                if (half.0..half.1).contains(&linear) {
                    return self.flush(ctx, Flush::All);
                }
                let page = linear & !0xfff;
                let index = Self::index(linear);
                for view in Self::ALL_VIEWS {
                    if ctx.load(ctx::tag_read(view), index) == page
                        || ctx.load(ctx::tag_write(view), index) == page
                    {
                        Self::drop_entry(ctx, view, index);
                    }
                }
                if self.bloom(page, false) {
                    self.drop_jumps(ctx);
                }
            }
        }
    }

    /// Forgets every jump-cache slot.
    pub fn drop_jumps(&mut self, ctx: &mut CtxBox) {
        for view in Self::ALL_VIEWS {
            self.flush_jumps(ctx, view, 0);
            self.flush_jumps(ctx, view, 1);
        }
        self.jump_bloom = [0; BLOOM / 64];
    }

    fn bloom(&mut self, page: u64, set: bool) -> bool {
        let hash = ((page >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52) as usize % BLOOM;
        let word = &mut self.jump_bloom[hash / 64];
        let old = *word & (1 << (hash % 64)) != 0;
        if set {
            *word |= 1 << (hash % 64);
        }
        old
    }

    /// Remembers that indirect jumps to `linear` in `view` lead to `code`, which may be floating.
    pub fn set_jump(
        &mut self,
        ctx: &mut CtxBox,
        view: View,
        linear: u64,
        code: u64,
        (global, floating): (bool, bool),
    ) {
        let slot = ctx::jump_slot(linear);
        let log = &mut self.jump_log[view as usize][usize::from(global)];
        if log.len() >= LOG_LIMIT {
            self.drop_jumps(ctx);
        }
        self.jump_log[view as usize][usize::from(global)].push(slot as u16);
        if !floating {
            self.bloom(linear & !0xfff, true);
        }
        ctx.store(ctx::jumps(view), slot, code);
    }

    /// Fills the TLB of `view` for the page of `linear`, which lies at host address `host`.
    pub fn fill(
        &mut self,
        ctx: &mut CtxBox,
        view: View,
        linear: u64,
        t: &Translation,
        (page, host): (usize, usize),
        write: bool,
    ) {
        let index = Self::index(linear);
        let tag = linear & !0xfff;
        ctx.store(ctx::tag_read(view), index, tag);
        ctx.store(ctx::tag_write(view), index, if write { tag } else { invalid(index) });
        ctx.store(ctx::addend(view), index, host as u64);
        if write {
            self.write_seen[page / 64] |= 1 << (page % 64);
        }
        if t.large {
            let half = &mut self.large[(linear >> 63) as usize];
            // The largest page is 1 GiB; a range that covers it whole is safe.
            half.0 = half.0.min(linear & !0x3fff_ffff);
            half.1 = half.1.max((linear | 0x3fff_ffff).saturating_add(1));
        }
        let log = &mut self.log[view as usize][usize::from(t.global)];
        log.push(index as u32);
        if log.len() > LOG_LIMIT {
            self.flush_log(ctx, view, usize::from(t.global));
        }
    }

    /// Takes the write permission from every entry that leads to RAM page `page` at `host`. Says whether there
    /// was one.
    pub fn forbid_writes(&mut self, ctx: &mut CtxBox, page: usize, host: usize) -> bool {
        let word = &mut self.write_seen[page / 64];
        if *word & (1 << (page % 64)) == 0 {
            return false;
        }
        *word &= !(1 << (page % 64));
        let mut found = false;
        for view in Self::ALL_VIEWS {
            for log in &self.log[view as usize] {
                for index in log {
                    let index = *index as usize;
                    if ctx.load(ctx::addend(view), index) == host as u64
                        && ctx.load(ctx::tag_write(view), index) != invalid(index)
                    {
                        ctx.store(ctx::tag_write(view), index, invalid(index));
                        found = true;
                    }
                }
            }
        }
        found
    }
}

struct Levels {
    large: bool,
    writable: bool,
    user: bool,
    nx: bool,
    global: bool,
}

/// Reads a page-table entry.
fn load(mem: &GuestMemory, gpa: u64, wide: bool) -> Option<(u64, usize)> {
    let (_, host) = mem.page(Gpa(gpa))?;
    let at = host + (gpa & 0xfff) as usize;
    // SAFETY: `page` gives a live RAM page; entries are naturally aligned within it, so the access stays inside
    // and is atomic against other vCPUs.
    let value = unsafe {
        if wide {
            (*(at as *const AtomicU64)).load(Ordering::Acquire)
        } else {
            u64::from((*(at as *const AtomicU32)).load(Ordering::Acquire))
        }
    };
    Some((value, at))
}

/// Sets bits in the entry at `at` if it still is `old`.
fn set_bits(at: usize, old: u64, bits: u64, wide: bool) -> bool {
    // SAFETY: as in `load`; the address came from there.
    unsafe {
        if wide {
            (*(at as *const AtomicU64))
                .compare_exchange(old, old | bits, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        } else {
            (*(at as *const AtomicU32))
                .compare_exchange(old as u32, (old | bits) as u32, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        }
    }
}

impl Core {
    /// Forgets translations.
    pub fn flush_tlb(&mut self, what: Flush) {
        match what {
            Flush::Page(_) => self.counters.page_invalidations += 1,
            _ => self.counters.tlb_flushes += 1,
        }
        self.bases.flush(&mut self.ctx, what);
        self.mmu.flush(&mut self.ctx, what);
    }

    fn max_phys_mask(&self) -> u64 {
        self.phys_mask
    }

    /// Walks the page tables for `linear`.
    ///
    /// # Errors
    /// #PF with the exact error code.
    pub fn walk(&mut self, linear: u64, want: Want, privilege: Privilege) -> Result<Translation> {
        let user = match privilege {
            Privilege::Current => self.sys.cpl == 3,
            Privilege::Supervisor => false,
        };
        if self.sys.cr0 & cr0::PG == 0 {
            let gpa = linear & 0xffff_ffff;
            return Ok(Translation { gpa, writable: true, global: false, large: false });
        }
        let smap = self.sys.cr4 & cr4::SMAP != 0
            && !user
            && want != Want::Fetch
            && (privilege == Privilege::Supervisor
                || self.ctx.get().rflags & wardian_cpu::bits::rflags::AC == 0);
        loop {
            match self.walk_once(linear, want, user, smap) {
                Ok(Some(t)) => return Ok(t),
                Ok(None) => {} // an entry changed under the walk
                Err(error) => {
                    self.counters.tlb_misses += 1;
                    return Err(Trap::pf(error, linear));
                }
            }
        }
    }

    fn walk_once(
        &self,
        linear: u64,
        want: Want,
        user: bool,
        smap: bool,
    ) -> std::result::Result<Option<Translation>, u32> {
        let nxe = self.sys.efer & efer::NXE != 0;
        let pae = self.sys.cr4 & cr4::PAE != 0;
        let smep = self.sys.cr4 & cr4::SMEP != 0;
        let mut code = 0u32;
        if want == Want::Write {
            code |= 2;
        }
        if user {
            code |= 4;
        }
        if want == Want::Fetch && (smep || (nxe && pae)) {
            code |= 16;
        }
        let phys = self.max_phys_mask();
        let mut perm = Levels { large: false, writable: true, user: true, nx: false, global: false };
        let (mut table, mut level) = if self.long_mode() {
            (self.sys.cr3 & phys & !0xfff, 4)
        } else if pae {
            (self.sys.cr3 & 0xffff_ffe0, 3)
        } else {
            (self.sys.cr3 & 0xffff_f000, 2)
        };
        let wide = pae;
        loop {
            let (shift, bits) = if wide { (12 + 9 * (level - 1), 9) } else { (12 + 10 * (level - 1), 10) };
            let slot = (linear >> shift) & ((1 << bits) - 1);
            let slot = if wide && !self.long_mode() && level == 3 { (linear >> 30) & 3 } else { slot };
            let gpa = table + slot * if wide { 8 } else { 4 };
            let Some((entry, at)) = load(&self.mem, gpa, wide) else {
                return Err(code); // a table outside RAM: nothing is present there
            };
            if entry & 1 == 0 {
                return Err(code);
            }
            let pdpte = wide && level == 3 && !self.long_mode();
            let leaf = level == 1
                || (entry & 0x80 != 0
                    && match level {
                        2 => wide || self.sys.cr4 & cr4::PSE != 0,
                        3 => self.long_mode(),
                        _ => false,
                    });
            // Reserved bits.
            let mut reserved = 0u64;
            if wide {
                reserved = (!phys & 0x000f_ffff_ffff_f000) | if nxe { 0 } else { 1 << 63 };
                if !self.long_mode() {
                    reserved |= 0x7ff0_0000_0000_0000;
                }
                if pdpte {
                    reserved |= (1 << 63) | 0x1e6;
                }
                if level == 4 {
                    reserved |= 0x80;
                }
                if leaf && level == 2 {
                    reserved |= 0x1f_e000;
                }
                if leaf && level == 3 {
                    reserved |= 0x3fff_e000;
                }
                if level == 3 && entry & 0x80 != 0 && !self.gib_pages {
                    reserved |= 0x80;
                }
            } else if leaf && level == 2 {
                reserved = 1 << 21; // PSE-36 with at most 40 bits
            }
            if entry & reserved != 0 {
                return Err(code | 9);
            }
            if !pdpte {
                perm.writable &= entry & 2 != 0;
                perm.user &= entry & 4 != 0;
                perm.nx |= wide && nxe && entry >> 63 != 0;
            }
            if !leaf {
                if entry & 0x20 == 0 && !pdpte && !set_bits(at, entry, 0x20, wide) {
                    return Ok(None);
                }
                table = entry & if wide { phys & 0x000f_ffff_ffff_f000 } else { 0xffff_f000 };
                level -= 1;
                continue;
            }
            perm.global = entry & 0x100 != 0 && self.sys.cr4 & cr4::PGE != 0;
            perm.large = level > 1;
            let wp = self.sys.cr0 & cr0::WP != 0;
            let denied = match want {
                Want::Read => (user && !perm.user) || (smap && perm.user),
                Want::Write => {
                    (user && !(perm.user && perm.writable))
                        || (!user && !perm.writable && wp)
                        || (smap && perm.user)
                }
                Want::Fetch => perm.nx || (user && !perm.user) || (!user && smep && perm.user),
            };
            if denied {
                return Err(code | 1);
            }
            let writable_now = if user { perm.user && perm.writable } else { perm.writable || !wp };
            let wanted_bits = 0x20 | if want == Want::Write { 0x40 } else { 0 };
            let mut dirty = entry & 0x40 != 0;
            if entry & wanted_bits != wanted_bits {
                if !set_bits(at, entry, wanted_bits, wide) {
                    return Ok(None);
                }
                dirty |= want == Want::Write;
            }
            let page_mask = (1u64 << shift) - 1;
            let base = if wide {
                entry & phys & 0x000f_ffff_ffff_f000 & !page_mask
            } else if leaf && level == 2 {
                (entry & 0xffc0_0000) | ((entry & 0x1f_e000) << 19)
            } else {
                entry & 0xffff_f000
            };
            return Ok(Some(Translation {
                gpa: base | (linear & page_mask),
                writable: writable_now && dirty,
                global: perm.global,
                large: perm.large,
            }));
        }
    }

    /// The RAM page that instructions at `linear` come from.
    ///
    /// # Errors
    /// #PF of the fetch; #GP when the page is not RAM (code in device memory is not carried).
    pub fn fetch_page(&mut self, linear: u64) -> Result<FetchPage> {
        let page = linear & !0xfff;
        let user = u64::from(self.sys.cpl == 3);
        let tag = page | user;
        let epoch = self.mmu.epoch;
        let slot = (linear >> 12) as usize % FETCH_ENTRIES;
        if self.mmu.fetch[slot].tag == tag && self.mmu.fetch[slot].epoch == epoch {
            return Ok(self.mmu.fetch[slot]);
        }
        let t = self.walk(linear, Want::Fetch, Privilege::Current)?;
        let Some((ram_page, host)) = self.mem.page(Gpa(t.gpa)) else {
            return Err(Trap::gp(0));
        };
        let found = FetchPage { tag, epoch, page: ram_page, host, global: t.global };
        self.mmu.fetch[slot] = found;
        Ok(found)
    }
}

impl Core {
    /// Linear to physical for debuggers: no permission checks, no accessed or dirty bits.
    pub fn peek_translation(&self, linear: u64) -> Option<u64> {
        if self.sys.cr0 & cr0::PG == 0 {
            return Some(linear & 0xffff_ffff);
        }
        let pae = self.sys.cr4 & cr4::PAE != 0;
        let (mut table, mut level) = match (self.long_mode(), pae) {
            (true, _) => (self.sys.cr3 & self.phys_mask & !0xfff, 4),
            (false, true) => (self.sys.cr3 & 0xffff_ffe0, 3),
            (false, false) => (self.sys.cr3 & 0xffff_f000, 2),
        };
        loop {
            let (shift, bits) = if pae { (12 + 9 * (level - 1), 9) } else { (12 + 10 * (level - 1), 10) };
            let slot = (linear >> shift) & ((1 << bits) - 1);
            let (entry, _) = load(&self.mem, table + slot * if pae { 8 } else { 4 }, pae)?;
            if entry & 1 == 0 {
                return None;
            }
            let mask = (1u64 << shift) - 1;
            let address = entry & if pae { self.phys_mask & 0x000f_ffff_ffff_f000 } else { 0xffff_f000 };
            if level == 1 || (entry & 0x80 != 0 && level <= 3) {
                return Some((address & !mask) | (linear & mask));
            }
            (table, level) = (address, level - 1);
        }
    }
}
