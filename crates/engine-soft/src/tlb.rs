//! The book of the software TLB that translated code probes, of the jump caches, and the fetch TLB.
//!
//! Filled entries are logged, so that a flush costs what was filled. The supervisor's tables are for the present
//! address space; the user's exist for the last [`SPACES`] of them, by PCID, so that a guest that loads CR3 without
//! forgetting finds again what it had. Those of the supervisor forget what is not global at every switch; a space that
//! is left forgets its global user pages, so whatever another space keeps is its own.

use wardian_memory::GuestMemory;

use crate::ctx::{self, CtxBox, JUMP_ENTRIES, SPACES, TLB_ENTRIES, VIEWS, View};
use crate::mmu::Translation;

/// What to forget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// Everything, global translations too.
    All,
    /// Everything but global translations.
    NonGlobal,
    /// The translations of a PCID, but global ones.
    Space(u16),
    /// The translations of one linear page in the present address space, and global ones.
    Page(u64),
    /// Those of one linear page in the address space of a PCID.
    PageOf(u16, u64),
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
/// Bits of the filter of pages that were jumped to.
const PAGES: usize = 1 << 16;
/// Bits of the filter of 2 MiB regions in which a large page was met.
const REGIONS: usize = 1 << 12;
const REGION: u64 = 21;
const NO_PCID: u16 = u16::MAX;
/// Number of the epoch of global fetch translations.
const GLOBAL: usize = SPACES;
const EMPTY: (u64, u64) = (u64::MAX, 0);

/// A set of numbers that may say that it has one that it has not.
struct Filter(Box<[u64]>);

impl Filter {
    fn new(bits: usize) -> Filter {
        Filter(vec![0; bits / 64].into_boxed_slice())
    }
    fn place(&self, number: u64) -> (usize, u64) {
        let hash = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let bit = hash as usize % (self.0.len() * 64);
        (bit / 64, 1 << (bit % 64))
    }
    fn add(&mut self, number: u64) {
        let (word, bit) = self.place(number);
        self.0[word] |= bit;
    }
    fn has(&self, number: u64) -> bool {
        let (word, bit) = self.place(number);
        self.0[word] & bit != 0
    }
}

/// Code that indirect jumps lead to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Jump {
    /// Its landing compares where it is now.
    Floating,
    /// It holds for its translation, which may be global, and for that of the next page if it `crosses` to that.
    Fixed { global: bool, crosses: bool },
}

/// What was filled into the tables of one view: one such book for global translations and one for the others, and one
/// for jumps to floating code.
struct Book {
    /// Filled indices.
    log: Vec<u32>,
    /// Filled slots of the jump cache.
    jumps: Vec<u16>,
    /// Linear pages that were jumped to.
    pages: Filter,
    /// Regions in which a large page was met, and whether there are any.
    regions: Filter,
    any: bool,
    /// Linear ranges that cover all pages larger than 2 MiB: lower half, upper half.
    huge: [(u64, u64); 2],
}

impl Book {
    fn new() -> Book {
        Book {
            log: Vec::new(),
            jumps: Vec::new(),
            pages: Filter::new(PAGES),
            regions: Filter::new(REGIONS),
            any: false,
            huge: [EMPTY; 2],
        }
    }

    fn note(&mut self, linear: u64, shift: u32) {
        match shift {
            12 => {}
            21 => {
                self.regions.add(linear >> REGION);
                self.any = true;
            }
            _ => {
                let half = &mut self.huge[(linear >> 63) as usize];
                // The largest page is 1 GiB; a range that covers it whole is safe.
                half.0 = half.0.min(linear & !0x3fff_ffff);
                half.1 = half.1.max((linear | 0x3fff_ffff).saturating_add(1));
            }
        }
    }

    fn has_large(&self, linear: u64) -> bool {
        self.any && self.regions.has(linear >> REGION)
    }

    fn has_huge(&self, linear: u64) -> bool {
        let (from, to) = self.huge[(linear >> 63) as usize];
        (from..to).contains(&linear)
    }

    fn forget_sizes(&mut self) {
        if std::mem::take(&mut self.any) {
            self.regions.0.fill(0);
        }
        self.huge = [EMPTY; 2];
    }
}

/// Book-keeping of one vCPU's TLB.
pub struct Mmu {
    /// Of the user's view in each space, then of the supervisor's two.
    books: Vec<[Book; 3]>,
    /// The address space in use, and which PCID each is for.
    current: usize,
    labels: [u16; SPACES],
    /// When each was used last.
    used: [u64; SPACES],
    clock: u64,
    /// Jump caches that were made empty: at first they are zero.
    ready: [bool; SPACES],
    /// Address of the thunk that empty jump-cache slots lead to.
    jump_miss: u64,
    fetch: Box<[FetchPage]>,
    /// What fetch translations of each space, and global ones, were made with; no two are ever the same.
    epochs: [u64; SPACES + 1],
    epoch: u64,
    /// RAM pages that may have live write entries.
    write_seen: Vec<u64>,
}

/// The value that never matches a probe of slot `index`.
fn invalid(index: usize) -> u64 {
    if index == 0 { 1 << 12 } else { 0 }
}

fn index(linear: u64) -> usize {
    (linear >> 12) as usize & (TLB_ENTRIES - 1)
}

impl Mmu {
    /// Empties `ctx`'s tables; `jump_miss` is where an empty jump slot leads.
    pub fn new(ctx: &mut CtxBox, mem: &GuestMemory, jump_miss: u64) -> Mmu {
        let mut mmu = Mmu {
            books: (0..SPACES + VIEWS - 1).map(|_| [Book::new(), Book::new(), Book::new()]).collect(),
            current: 0,
            labels: [NO_PCID; SPACES],
            used: [0; SPACES],
            clock: 0,
            ready: [false; SPACES],
            jump_miss,
            fetch: vec![FetchPage::default(); FETCH_ENTRIES].into_boxed_slice(),
            epochs: [0; SPACES + 1],
            epoch: 0,
            write_seen: vec![0; (mem.size() / 4096).div_ceil(64) as usize],
        };
        for view in [View::Kernel, View::KernelUser] {
            mmu.clear(ctx, view);
        }
        for space in 0..=GLOBAL {
            mmu.renew(space);
        }
        mmu.labels[0] = 0;
        mmu.enter(ctx, 0);
        mmu
    }

    /// Makes a table that was never used an empty one.
    fn clear(&self, ctx: &mut CtxBox, view: View) {
        ctx.store(ctx::tag_read(view), 0, invalid(0));
        ctx.store(ctx::tag_write(view), 0, invalid(0));
        for slot in 0..JUMP_ENTRIES {
            ctx.store(ctx::jumps(view), slot, self.jump_miss);
        }
    }

    fn enter(&mut self, ctx: &mut CtxBox, space: usize) {
        self.current = space;
        ctx.select(space);
        if !std::mem::replace(&mut self.ready[space], true) {
            self.clear(ctx, View::User);
        }
    }

    /// The number of a view's book.
    fn book(&self, view: View) -> usize {
        match view {
            View::User => self.current,
            View::Kernel => SPACES,
            View::KernelUser => SPACES + 1,
        }
    }

    /// The view of book `book` and a space in which it is found.
    fn place(&self, book: usize) -> (View, usize) {
        match book {
            0..SPACES => (View::User, book),
            SPACES => (View::Kernel, self.current),
            _ => (View::KernelUser, self.current),
        }
    }

    /// Whatever was fetched in `space` (or globally) is not found again.
    fn renew(&mut self, space: usize) {
        self.epoch += 1;
        self.epochs[space] = self.epoch;
    }

    /// The host address of `linear`, if `view` has an entry for such an access.
    #[inline]
    pub fn lookup(&self, ctx: &CtxBox, view: View, linear: u64, write: bool) -> Option<usize> {
        let index = index(linear);
        let table = if write { ctx::tag_write(view) } else { ctx::tag_read(view) };
        (ctx.load(table, index) == linear & !0xfff)
            .then(|| (ctx.load(ctx::addend(view), index) + (linear & 0xfff)) as usize)
    }

    /// The fetch translation of `linear`, if it is known.
    #[inline]
    pub fn fetched(&self, linear: u64, user: bool) -> Option<FetchPage> {
        let found = &self.fetch[(linear >> 12) as usize % FETCH_ENTRIES];
        let fresh = found.epoch == self.epochs[self.current] || found.epoch == self.epochs[GLOBAL];
        (found.tag == (linear & !0xfff | u64::from(user)) && fresh).then_some(*found)
    }

    /// Remembers a fetch translation.
    pub fn fill_fetch(
        &mut self,
        view: View,
        linear: u64,
        user: bool,
        t: &Translation,
        (page, host): (usize, usize),
    ) -> FetchPage {
        let book = self.book(view);
        self.books[book][usize::from(t.global)].note(linear, t.shift);
        let epoch = self.epochs[if t.global { GLOBAL } else { self.current }];
        let found = FetchPage { tag: linear & !0xfff | u64::from(user), epoch, page, host, global: t.global };
        self.fetch[(linear >> 12) as usize % FETCH_ENTRIES] = found;
        found
    }

    fn flush_log(&mut self, ctx: &mut CtxBox, book: usize, global: usize) {
        let (view, space) = self.place(book);
        let book = &mut self.books[book][global];
        for index in book.log.drain(..) {
            let index = index as usize;
            ctx.store_in(space, ctx::tag_read(view), index, invalid(index));
            ctx.store_in(space, ctx::tag_write(view), index, invalid(index));
        }
    }

    fn flush_jumps(&mut self, ctx: &mut CtxBox, book: usize, global: usize) {
        let (view, space) = self.place(book);
        let miss = self.jump_miss;
        let book = &mut self.books[book][global];
        if book.jumps.is_empty() {
            return;
        }
        for slot in book.jumps.drain(..) {
            ctx.store_in(space, ctx::jumps(view), slot as usize, miss);
        }
        book.pages.0.fill(0);
    }

    fn flush_book(&mut self, ctx: &mut CtxBox, book: usize, global: usize) {
        self.flush_log(ctx, book, global);
        self.flush_jumps(ctx, book, global);
        self.books[book][global].forget_sizes();
    }

    /// Forgets what the supervisor's views have of one address space.
    fn flush_supervisor(&mut self, ctx: &mut CtxBox) {
        for view in [View::Kernel, View::KernelUser] {
            self.flush_book(ctx, self.book(view), 0);
        }
    }

    /// The address space of `pcid`, if it is one of those that are kept.
    pub fn space_of(&self, pcid: u16) -> Option<usize> {
        self.labels.iter().position(|label| *label == pcid)
    }

    /// Forgets.
    pub fn flush(&mut self, ctx: &mut CtxBox, what: Flush) {
        match what {
            Flush::All => {
                for book in 0..self.books.len() {
                    self.flush_book(ctx, book, 0);
                    self.flush_book(ctx, book, 1);
                }
                for space in 0..=GLOBAL {
                    self.renew(space);
                }
            }
            Flush::NonGlobal => {
                for book in 0..self.books.len() {
                    self.flush_book(ctx, book, 0);
                }
                for space in 0..SPACES {
                    self.renew(space);
                }
            }
            Flush::Space(pcid) => {
                let Some(space) = self.space_of(pcid) else { return };
                self.flush_book(ctx, space, 0);
                self.renew(space);
                if space == self.current {
                    self.flush_supervisor(ctx);
                }
            }
            Flush::Page(linear) => {
                self.flush_page(ctx, self.current, linear);
                self.flush_page(ctx, SPACES, linear);
                self.flush_page(ctx, SPACES + 1, linear);
            }
            Flush::PageOf(pcid, linear) => match self.space_of(pcid) {
                Some(space) if space == self.current => self.flush(ctx, Flush::Page(linear)),
                Some(space) => self.flush_page(ctx, space, linear),
                None => {}
            },
        }
    }

    /// Logarithm of the size of the largest page that may be at `linear` for the user, in any address space.
    pub fn user_size(&self, linear: u64) -> u32 {
        let user = || self.books[..SPACES].iter().flatten();
        if user().any(|book| book.has_huge(linear)) {
            return 30;
        }
        if user().any(|book| book.has_large(linear)) { REGION as u32 } else { 12 }
    }

    /// Forgets the page of `linear`, of whatever size it is, in one view.
    fn flush_page(&mut self, ctx: &mut CtxBox, book: usize, linear: u64) {
        let (view, space) = self.place(book);
        let both = &self.books[book];
        if both.iter().any(|b| b.has_huge(linear)) {
            // (A huge page of another space is in that space's book.)
            for global in 0..2 {
                self.flush_book(ctx, book, global);
            }
            self.renew(space);
            self.renew(GLOBAL);
            return;
        }
        let page = linear & !0xfff;
        if both.iter().any(|b| b.has_large(linear)) {
            let first = linear >> REGION << REGION;
            for page in (first..=first | 0x1f_ffff).step_by(4096) {
                Self::drop_entry(ctx, space, view, page);
            }
            self.flush_jumps(ctx, book, 0);
            self.flush_jumps(ctx, book, 1);
            self.renew(space);
            self.renew(GLOBAL);
            return;
        }
        Self::drop_entry(ctx, space, view, page);
        let fetched = &mut self.fetch[(linear >> 12) as usize % FETCH_ENTRIES];
        if fetched.tag & !0xfff == page {
            fetched.epoch = 0;
        }
        if self.books[book].iter().any(|b| b.pages.has(page >> 12)) {
            // All the slots that addresses of the page can have.
            let first = ctx::jump_slot(page) & !0xfff;
            for slot in first..first + 4096 {
                ctx.store_in(space, ctx::jumps(view), slot, self.jump_miss);
            }
            // Those of instructions that end in the page.
            for linear in (1..15).map(|before| page.wrapping_sub(before)) {
                ctx.store_in(space, ctx::jumps(view), ctx::jump_slot(linear), self.jump_miss);
            }
        }
    }

    fn drop_entry(ctx: &mut CtxBox, space: usize, view: View, page: u64) {
        let index = index(page);
        if ctx.load_in(space, ctx::tag_read(view), index) == page
            || ctx.load_in(space, ctx::tag_write(view), index) == page
        {
            ctx.store_in(space, ctx::tag_read(view), index, invalid(index));
            ctx.store_in(space, ctx::tag_write(view), index, invalid(index));
        }
    }

    /// The present address space is that of `pcid`, and no other is known. To be called when nothing is.
    pub fn label(&mut self, pcid: u16) {
        self.labels = [NO_PCID; SPACES];
        self.labels[self.current] = pcid;
    }

    /// Goes to the address space of `pcid`, if it is another one: gives its number, and whether it was kept.
    pub fn select(&mut self, ctx: &mut CtxBox, pcid: u16) -> Option<(usize, bool)> {
        if self.labels[self.current] == pcid {
            return None;
        }
        self.flush_supervisor(ctx);
        self.flush_book(ctx, self.current, 1);
        self.clock += 1;
        self.used[self.current] = self.clock;
        let known = self.space_of(pcid);
        let space = known.unwrap_or_else(|| {
            let others = (0..SPACES).filter(|space| *space != self.current);
            let oldest = others.min_by_key(|space| (self.labels[*space] != NO_PCID, self.used[*space]));
            let space = oldest.unwrap_or(self.current);
            self.flush_book(ctx, space, 0);
            self.renew(space);
            self.labels[space] = pcid;
            space
        });
        self.enter(ctx, space);
        Some((space, known.is_some()))
    }

    /// Forgets every jump-cache slot.
    pub fn drop_jumps(&mut self, ctx: &mut CtxBox) {
        for book in 0..self.books.len() {
            for place in 0..3 {
                self.flush_jumps(ctx, book, place);
            }
        }
    }

    /// Whether the slot for indirect jumps to `linear` is filled.
    pub fn jump_taken(&self, ctx: &CtxBox, view: View, linear: u64) -> bool {
        ctx.load(ctx::jumps(view), ctx::jump_slot(linear)) != self.jump_miss
    }

    /// Remembers that indirect jumps to `linear` in `view` lead to `code`.
    pub fn set_jump(&mut self, ctx: &mut CtxBox, view: View, linear: u64, code: u64, kind: Jump) {
        let (slot, number) = (ctx::jump_slot(linear), self.book(view));
        let place = match kind {
            // Its landing knows whether it is meant, in whatever address space.
            Jump::Floating => 2,
            Jump::Fixed { global, .. } => usize::from(global),
        };
        if self.books[number][place].jumps.len() >= LOG_LIMIT {
            self.flush_jumps(ctx, number, place);
        }
        let book = &mut self.books[number][place];
        book.jumps.push(slot as u16);
        if let Jump::Fixed { crosses, .. } = kind {
            book.pages.add(linear >> 12);
            if crosses {
                book.pages.add((linear >> 12) + 1);
            }
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
        let (index, number) = (index(linear), self.book(view));
        let book = &mut self.books[number][usize::from(t.global)];
        book.note(linear, t.shift);
        book.log.push(index as u32);
        if book.log.len() > LOG_LIMIT {
            self.flush_log(ctx, number, usize::from(t.global));
            self.books[number][usize::from(t.global)].log.push(index as u32);
        }
        let tag = linear & !0xfff;
        ctx.store(ctx::tag_read(view), index, tag);
        ctx.store(ctx::tag_write(view), index, if write { tag } else { invalid(index) });
        ctx.store(ctx::addend(view), index, host as u64);
        if write {
            self.write_seen[page / 64] |= 1 << (page % 64);
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
        for (number, book) in self.books.iter().enumerate() {
            let (view, space) = self.place(number);
            for index in book.iter().flat_map(|book| &book.log) {
                let index = *index as usize;
                if ctx.load_in(space, ctx::addend(view), index) == host as u64
                    && ctx.load_in(space, ctx::tag_write(view), index) != invalid(index)
                {
                    ctx.store_in(space, ctx::tag_write(view), index, invalid(index));
                    found = true;
                }
            }
        }
        found
    }
}
