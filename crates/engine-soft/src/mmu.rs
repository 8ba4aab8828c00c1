//! Paging: the page walk.
//!
//! Source: Intel SDM vol. 3A, chapter 5. Walks set accessed and dirty bits by compare-exchange, check reserved
//! bits, and honour NX, WP, SMEP, SMAP and the page-size bits in 32-bit, PAE and 4-level paging.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use wardian_cpu::bits::{cr0, cr4, efer};
use wardian_memory::{Gpa, GuestMemory};

use crate::core::{Core, Privilege};
use crate::tlb::{FetchPage, Flush};
use crate::trap::{Result, Trap};

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
    /// Logarithm of the size of the page that maps it.
    pub shift: u32,
}

struct Levels {
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
            Flush::Page(_) | Flush::PageOf(..) => self.counters.page_invalidations += 1,
            _ => self.counters.tlb_flushes += 1,
        }
        match what {
            Flush::All | Flush::NonGlobal => self.bases.unbind_all(&mut self.ctx),
            Flush::Space(pcid) => {
                if let Some(space) = self.mmu.space_of(pcid) {
                    self.bases.unbind(&mut self.ctx, space);
                }
            }
            Flush::Page(linear) | Flush::PageOf(_, linear) => match self.mmu.user_size(linear) {
                12 => self.bases.unbind_page(&mut self.ctx, linear, false),
                21 => self.bases.unbind_page(&mut self.ctx, linear, true),
                _ => self.bases.unbind_all(&mut self.ctx),
            },
        }
        self.mmu.flush(&mut self.ctx, what);
        if what == Flush::All {
            let pcid = self.pcid();
            self.mmu.label(pcid);
        }
    }

    /// The current address space's number.
    pub fn pcid(&self) -> u16 {
        if self.sys.cr4 & cr4::PCIDE != 0 { self.sys.cr3 as u16 & 0xfff } else { 0 }
    }

    /// CR3 was loaded. `keep`: without forgetting what is known of that address space.
    pub fn switch_space(&mut self, keep: bool) {
        let pcid = self.pcid();
        if let Some((space, known)) = self.mmu.select(&mut self.ctx, pcid) {
            self.counters.space_switches += 1;
            self.bases.select(space);
            if !known {
                self.bases.unbind(&mut self.ctx, space);
            }
        }
        if !keep {
            self.flush_tlb(Flush::Space(pcid));
        }
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
            return Ok(Translation { gpa, writable: true, global: false, shift: 12 });
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
        let mut perm = Levels { writable: true, user: true, nx: false, global: false };
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
                shift,
            }));
        }
    }

    /// The RAM page that instructions at `linear` come from.
    ///
    /// # Errors
    /// #PF of the fetch; #GP when the page is not RAM (code in device memory is not carried).
    pub fn fetch_page(&mut self, linear: u64) -> Result<FetchPage> {
        let user = self.sys.cpl == 3;
        if let Some(found) = self.mmu.fetched(linear, user) {
            return Ok(found);
        }
        let t = self.walk(linear, Want::Fetch, Privilege::Current)?;
        let Some((page, host)) = self.mem.page(Gpa(t.gpa)) else {
            return Err(Trap::gp(0));
        };
        let view = self.view();
        Ok(self.mmu.fill_fetch(view, linear, user, &t, (page, host)))
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
