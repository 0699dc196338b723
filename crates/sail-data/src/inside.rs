//! What the benches measure of the inside of this crate. No part of its interface.

pub use crate::packer::{Load, choose};

use crate::error::Result;
use crate::shard::Shard;
use crate::spec::StoreSpec;
use crate::store::Store;

/// Reads all samples of the shard at this path, nothing decoded; how many members they have.
///
/// # Errors
/// As training reports them of a shard.
pub fn read_shard(path: &str) -> Result<usize> {
    let shard = Shard::open(&Store::new(&StoreSpec::default())?, path)?;
    let mut scanner = shard.scan(0, 0);
    let mut members = 0;
    while let Some(extent) = scanner.next_sample()? {
        members += shard.read(extent)?.members.len();
    }
    Ok(members)
}
