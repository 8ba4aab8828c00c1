//! Which bytes of RAM have been translated, and the hook that tells the code caches of writes.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use vm_memory::bitmap::{ArcSlice, Bitmap, NewBitmap, WithBitmapSlice};

/// Bytes per mark: 64 marks make a page.
const GRAIN: usize = 64;

/// Told when bytes that were translated have been written by somebody else than translated code.
pub trait CodeListener: Send + Sync {
    /// The marks `granules` (bit n = bytes 64n..64n+64) of RAM page number `page` were hit and are
    /// cleared. Must not block: forget the translations soon, at the latest before the next interrupt.
    fn code_written(&self, page: usize, granules: u64);
}

#[derive(Default)]
struct Marks {
    pages: Vec<AtomicU64>,
    listener: OnceLock<Arc<dyn CodeListener>>,
}

impl std::fmt::Debug for Marks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Marks").field("pages", &self.pages.len()).finish_non_exhaustive()
    }
}

/// The write hook of one RAM region: a `vm-memory` bitmap whose "dirty" call finds translated code.
///
/// Page numbers are those of the whole machine's RAM (low region first), not guest frame numbers.
#[derive(Clone, Debug, Default)]
pub struct WriteTracker {
    marks: Arc<Marks>,
    first_page: usize,
}

/// The 64-byte marks of `range` within one page.
fn mask(range: Range<usize>) -> u64 {
    let (first, last) = (range.start / GRAIN, (range.end - 1) / GRAIN);
    (u64::MAX >> (63 - last)) & (u64::MAX << first)
}

impl WriteTracker {
    pub(crate) fn for_pages(pages: usize) -> WriteTracker {
        let mut all = Vec::new();
        all.resize_with(pages, AtomicU64::default);
        WriteTracker { marks: Arc::new(Marks { pages: all, listener: OnceLock::new() }), first_page: 0 }
    }

    pub(crate) fn region(&self, first_page: usize) -> WriteTracker {
        WriteTracker { marks: Arc::clone(&self.marks), first_page }
    }

    pub(crate) fn set_listener(&self, listener: Arc<dyn CodeListener>) -> bool {
        self.marks.listener.set(listener).is_ok()
    }

    /// Marks the bytes `range` of `page` as translated; returns the marks of the page before.
    pub(crate) fn mark(&self, page: usize, range: Range<usize>) -> u64 {
        self.marks.pages.get(page).map_or(0, |marks| marks.fetch_or(mask(range), Ordering::AcqRel))
    }

    pub(crate) fn marked(&self, page: usize) -> u64 {
        self.marks.pages.get(page).map_or(0, |marks| marks.load(Ordering::Acquire))
    }

    /// Somebody wrote `len` bytes at `offset` from the start of RAM page `first_page`.
    fn written(&self, offset: usize, len: usize) {
        let mut at = offset;
        let end = offset.saturating_add(len);
        while at < end {
            let page = self.first_page + at / 4096;
            let stop = end.min((at / 4096 + 1) * 4096);
            let Some(marks) = self.marks.pages.get(page) else { return };
            let old = marks.load(Ordering::Acquire);
            if old != 0 {
                let hit = old & mask(at % 4096..at % 4096 + (stop - at));
                if hit != 0 {
                    marks.fetch_and(!hit, Ordering::AcqRel);
                    if let Some(listener) = self.marks.listener.get() {
                        listener.code_written(page, hit);
                    }
                }
            }
            at = stop;
        }
    }
}

impl WithBitmapSlice<'_> for WriteTracker {
    type S = ArcSlice<WriteTracker>;
}

impl Bitmap for WriteTracker {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.written(offset, len);
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> ArcSlice<WriteTracker> {
        ArcSlice::new(Arc::new(self.clone()), offset)
    }
}

impl NewBitmap for WriteTracker {
    fn with_len(len: usize) -> Self {
        WriteTracker::for_pages(len.div_ceil(4096))
    }
}
