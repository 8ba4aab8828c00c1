//! Floating code: translations of user code that hold wherever their page lies.
//!
//! The key of a floating block has no linear address. What its code needs of it (the landing's compare, RIP-relative
//! operands, return addresses, where to leave to) it computes from its page's *base*, a word of the context: the linear
//! address at which the RAM page runs now, in the present address space. A library that each process maps elsewhere is so
//! translated once.
//!
//! **Architecture Invariant:** a base is either [`UNBOUND`] or the linear address of a page that translates to its RAM page
//! in the current address space, for user fetches. The run loop binds, every flush of the TLB unbinds. Jumps between
//! floating blocks need no revocation: they compare bases.

use crate::access::Site;
use crate::ctx::{self, BASE_ENTRIES, BASES, CtxBox, SPACES, View};
use crate::mode::Mode;

/// Number of a base. 0 is the one that is never bound, and stands for "none".
pub type Base = u32;

/// Base of a page that is not bound: not canonical, so nothing that runs lies there.
const UNBOUND: u64 = 1 << 63 | 0x5a5a_5000;

/// From here on direct jumps might lead to addresses that are not canonical.
const END: u64 = 0x7fff_7000_0000;

/// Bindings that are kept.
const MOST: usize = 1 << 16;
const FILTER: usize = 4096;

/// Bit of a [`Site`] that holds a base instead of a linear page.
const FLOATING: u64 = 1 << 61;

/// Whether code at `linear` floats in `mode`.
///
/// (A jump to [`UNBOUND`] itself must not find a landing in the jump cache: the pages that share its slots do not float.)
pub fn floats(mode: Mode, linear: u64) -> bool {
    mode.code64()
        && mode.view() == View::User
        && !mode.single()
        && linear < END
        && ctx::jump_slot(linear & !0xfff) != ctx::jump_slot(UNBOUND)
}

/// Displacement of a base from RBP.
pub const fn disp(base: Base) -> i32 {
    BASES + base as i32 * 8
}

/// The bases of one vCPU.
pub struct Bases {
    /// By RAM page.
    of_page: Vec<Base>,
    next: Base,
    /// The address space in use.
    current: usize,
    spaces: [Bound; SPACES],
}

/// What was bound in one address space since it was flushed.
struct Bound {
    /// Linear pages and, of the same number, bases. Some may be out of date.
    linear: Vec<u64>,
    bases: Vec<Base>,
    /// Which linear pages, hashed, are among them.
    filter: [u64; FILTER / 64],
}

impl Bases {
    pub fn new(ctx: &mut CtxBox, ram_pages: usize) -> Bases {
        for space in 0..SPACES {
            ctx.store_in(space, BASES, 0, UNBOUND);
        }
        Bases {
            of_page: vec![0; ram_pages],
            next: 1,
            current: 0,
            spaces: std::array::from_fn(|_| Bound {
                linear: Vec::new(),
                bases: Vec::new(),
                filter: [0; FILTER / 64],
            }),
        }
    }

    /// Whether another block (of two pages at most) may have its bases.
    pub fn has_room(&self) -> bool {
        (self.next as usize) < BASE_ENTRIES - 2
    }

    /// The base of RAM page `page`. Only if there [is room](Bases::has_room).
    pub fn of(&mut self, ctx: &mut CtxBox, page: usize) -> Base {
        if self.of_page[page] == 0 {
            for space in 0..SPACES {
                ctx.store_in(space, BASES, self.next as usize, UNBOUND);
            }
            self.of_page[page] = self.next;
            self.next += 1;
        }
        self.of_page[page]
    }

    /// No code uses a base any more.
    pub fn clear(&mut self, ctx: &mut CtxBox) {
        self.unbind_all(ctx);
        self.of_page.fill(0);
        self.next = 1;
    }

    /// The address space in use is `space` from now on.
    pub fn select(&mut self, space: usize) {
        self.current = space % SPACES;
    }

    /// Notes that the page of `base` runs at the linear page `linear` from now on.
    #[inline]
    pub fn bind(&mut self, ctx: &mut CtxBox, base: Base, linear: u64) {
        if ctx.load(BASES, base as usize) == linear {
            return;
        }
        if self.spaces[self.current].bases.len() >= MOST {
            self.unbind(ctx, self.current);
        }
        let bound = &mut self.spaces[self.current];
        bound.linear.push(linear);
        bound.bases.push(base);
        let at = Self::hash(linear);
        bound.filter[at / 64] |= 1 << (at % 64);
        ctx.store(BASES, base as usize, linear);
    }

    fn hash(linear: u64) -> usize {
        ((linear >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52) as usize % FILTER
    }

    /// Unbinds all of one address space.
    pub fn unbind(&mut self, ctx: &mut CtxBox, space: usize) {
        let bound = &mut self.spaces[space];
        if bound.bases.is_empty() {
            return;
        }
        for base in bound.bases.drain(..) {
            ctx.store_in(space, BASES, base as usize, UNBOUND);
        }
        bound.linear.clear();
        bound.filter = [0; FILTER / 64];
    }

    /// Unbinds all of all address spaces.
    pub fn unbind_all(&mut self, ctx: &mut CtxBox) {
        (0..SPACES).for_each(|space| self.unbind(ctx, space));
    }

    /// Unbinds the linear page of `linear`, or the 2 MiB around it (`wide`), in every address space: it may be global.
    pub fn unbind_page(&mut self, ctx: &mut CtxBox, linear: u64, wide: bool) {
        let (shift, at) = (if wide { 21 } else { 12 }, Self::hash(linear & !0xfff));
        for (space, bound) in self.spaces.iter().enumerate() {
            if !wide && bound.filter[at / 64] & (1 << (at % 64)) == 0 {
                continue;
            }
            for (known, base) in bound.linear.iter().zip(&bound.bases) {
                if known >> shift == linear >> shift && ctx.load_in(space, BASES, *base as usize) == *known {
                    ctx.store_in(space, BASES, *base as usize, UNBOUND);
                }
            }
        }
    }
}

/// The linear address `rip`, or the one at offset `rip` in the page of `base`, if that is one.
#[inline]
pub fn settled(ctx: &CtxBox, base: Base, rip: u64) -> u64 {
    if base == 0 { rip } else { ctx.load(BASES, base as usize).wrapping_add(rip & 0xfff) }
}

impl Site {
    /// The same access, of floating code.
    pub fn floating(self, base: Base) -> Site {
        if base == 0 {
            return self;
        }
        Site(self.0 & !0xffff_ffff_f000 | u64::from(base) << 12 | FLOATING)
    }

    /// The same access where it is now.
    #[inline]
    pub fn settled(self, ctx: &CtxBox) -> Site {
        if self.0 & FLOATING == 0 {
            return self;
        }
        let page = ctx.load(BASES, (self.0 >> 12) as usize) & 0xffff_ffff_f000;
        Site(self.0 & !(0xffff_ffff_f000 | FLOATING) | page)
    }
}

#[cfg(test)]
mod tests {
    use super::{Bases, Site, UNBOUND, disp, floats, settled};
    use crate::ctx::{BASES, CtxBox, jump_slot};
    use crate::mode::Mode;

    #[test]
    fn a_base_is_unbound_by_the_flush_of_its_page_and_of_all() {
        let mut ctx = CtxBox::new().unwrap();
        let mut bases = Bases::new(&mut ctx, 100);
        let (a, b) = (bases.of(&mut ctx, 7), bases.of(&mut ctx, 9));
        assert_eq!((bases.of(&mut ctx, 7), a, b), (a, 1, 2));
        assert_eq!(settled(&ctx, a, 0x123), UNBOUND + 0x123);
        bases.bind(&mut ctx, a, 0x7000);
        bases.bind(&mut ctx, b, 0x9000);
        bases.unbind_page(&mut ctx, 0x8000, false);
        assert_eq!((settled(&ctx, a, 0x5123), settled(&ctx, b, 0)), (0x7123, 0x9000));
        bases.unbind_page(&mut ctx, 0x7abc, false);
        assert_eq!((settled(&ctx, a, 0), settled(&ctx, b, 0)), (UNBOUND, 0x9000));
        // What is bound elsewhere meanwhile stays.
        bases.bind(&mut ctx, b, 0xa000);
        bases.unbind_page(&mut ctx, 0x9000, false);
        assert_eq!(settled(&ctx, b, 0), 0xa000);
        // Another address space has its own, which a page's flush finds as well.
        ctx.select(3);
        bases.select(3);
        assert_eq!(settled(&ctx, b, 0), UNBOUND);
        bases.bind(&mut ctx, b, 0x9000);
        bases.bind(&mut ctx, a, 0x20_1000);
        ctx.select(0);
        bases.select(0);
        assert_eq!(settled(&ctx, b, 0), 0xa000);
        bases.unbind_page(&mut ctx, 0x9123, false);
        bases.unbind_page(&mut ctx, 0x3f_f000, true);
        ctx.select(3);
        assert_eq!((settled(&ctx, a, 0), settled(&ctx, b, 0)), (UNBOUND, UNBOUND));
        ctx.select(0);
        bases.unbind(&mut ctx, 0);
        assert_eq!(settled(&ctx, b, 0), UNBOUND);
        assert_eq!(ctx.load(BASES, 0), UNBOUND);
        assert_eq!(settled(&ctx, 0, 0x1234_5678), 0x1234_5678);
    }

    #[test]
    fn sites_settle_where_their_page_is_bound() {
        let mut ctx = CtxBox::new().unwrap();
        let mut bases = Bases::new(&mut ctx, 100);
        let base = bases.of(&mut ctx, 50);
        bases.bind(&mut ctx, base, 0x7fff_1234_5000);
        let site = Site::new(0x1678, 8, true, true, 3, true).unwrap().with_mask();
        let there = Site::new(0x7fff_1234_5678, 8, true, true, 3, true).unwrap().with_mask();
        assert_eq!(site.floating(base).settled(&ctx).0, there.0);
        assert_eq!(site.settled(&ctx).0, site.0);
        assert_eq!(site.floating(0).0, site.0);
        assert!(disp(base) > disp(0));
    }

    #[test]
    fn a_jump_to_the_address_of_nothing_finds_no_floating_code() {
        // A landing at offset `at` accepts UNBOUND + at while its page is not bound.
        let user = Mode::user64();
        for page in (0..0x20_0000u64).map(|n| n << 12) {
            for at in [0, 1, 0x7ff, 0xfff] {
                assert!(!floats(user, page) || jump_slot(page + at) != jump_slot(UNBOUND + at));
            }
        }
    }
}
