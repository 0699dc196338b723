//! Greedy continuation of one sequence with a key and value cache.
//!
//! Not a sampler and not a server: one sequence, the likeliest token each time. Called by
//! [`crate::vlm::Vlm::generate`], and directly where there is no image.
//!
//! Dimension letters: t rows of the prompt, d model width.

use tch::{Kind, Tensor};

use crate::attention::Segments;
use crate::error::Result;
use crate::llm::{KvCache, Llm};

/// Continues token ids. As [`greedy_from_embeddings`].
pub fn greedy(llm: &Llm, prompt_ids: &[i64], max_new_tokens: usize, stop_ids: &[i64]) -> Result<Vec<i64>> {
    tch::no_grad(|| {
        let ids_t = Tensor::from_slice(prompt_ids).to_device(llm.device());
        greedy_from_embeddings(llm, &llm.embed(&ids_t), max_new_tokens, stop_ids)
    })
}

/// Continues a prompt given as embeddings `[t, d]`, building no graph.
///
/// Gives at most `max_new_tokens` ids; the last is one of `stop_ids` when that ended the text.
///
/// # Errors
/// [`crate::Error::Segments`] for an empty prompt.
pub fn greedy_from_embeddings(
    llm: &Llm,
    prompt_td: &Tensor,
    max_new_tokens: usize,
    stop_ids: &[i64],
) -> Result<Vec<i64>> {
    tch::no_grad(|| {
        let mut cache = llm.new_cache(prompt_td.size()[0] + max_new_tokens as i64);
        let mut new_ids = Vec::new();
        let mut rows_td = prompt_td.shallow_clone();
        while new_ids.len() < max_new_tokens {
            let next = likeliest_next(llm, &rows_td, &mut cache)?;
            new_ids.push(next);
            if stop_ids.contains(&next) {
                break;
            }
            rows_td = llm.embed(&Tensor::from_slice(&[next]).to_device(llm.device()));
        }
        Ok(new_ids)
    })
}

/// The token with the highest score after `rows_td`, which continue the cache's sequence.
fn likeliest_next(llm: &Llm, rows_td: &Tensor, cache: &mut KvCache) -> Result<i64> {
    let (start, rows) = (cache.rows(), rows_td.size()[0]);
    let segments = Segments::single(rows)?;
    let positions_t = Tensor::arange_start(start, start + rows, (Kind::Int64, llm.device()));
    let x_td = llm.trunk(rows_td, &positions_t, &segments, Some(cache));
    let last_1d = llm.final_norm(&x_td.narrow(0, rows - 1, 1));
    Ok(llm.logits(&last_1d).argmax(-1, false).int64_value(&[0]))
}
