//! Work on many pieces of files with every core.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::TransferError;

/// Does `work` for each of `jobs` on up to four threads; the results stand in the jobs' order. The
/// first error stops it.
pub(super) fn in_parallel<J: Sync, R: Send>(
    jobs: &[J],
    work: impl Fn(&J) -> Result<R, TransferError> + Sync,
) -> Result<Vec<R>, TransferError> {
    let threads = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(4)
        .min(jobs.len().max(1));
    if threads == 1 {
        return jobs.iter().map(work).collect();
    }
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    let run = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(job) = jobs.get(index) else {
                return done;
            };
            match work(job) {
                Ok(result) => done.push((index, result)),
                Err(error) => {
                    next.store(jobs.len(), Ordering::Relaxed);
                    *failed.lock().expect("no one panics with it") = Some(error);
                    return done;
                }
            }
        }
    };
    let mut results: Vec<(usize, R)> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        handles
            .into_iter()
            .flat_map(|handle| handle.join().expect("workers do not panic"))
            .collect()
    });
    if let Some(error) = failed.into_inner().expect("no one panics with it") {
        return Err(error);
    }
    results.sort_unstable_by_key(|(index, _)| *index);
    Ok(results.into_iter().map(|(_, result)| result).collect())
}
