//! Ranks of these tests are threads, and their store is on this host.

use super::*;

/// Runs `body` on `size` threads, each a rank of one group.
fn ranks(size: usize, body: impl Fn(ProcessGroup) + Send + Sync) {
    let server = Store::serve(0, Duration::from_secs(20)).unwrap();
    std::thread::scope(|scope| {
        for rank in 0..size {
            let (body, port) = (&body, server.port());
            scope.spawn(move || {
                let timeout = Duration::from_secs(20);
                let store = Store::connect("127.0.0.1", port, "group", timeout).unwrap();
                let address = Some("127.0.0.1".to_owned());
                let options = GroupOptions {
                    name: "test".into(),
                    backend: Backend::Gloo,
                    rank,
                    size,
                    timeout,
                    address,
                };
                body(ProcessGroup::join(&store, options).unwrap());
            });
        }
    });
}

fn values(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.to_kind(Kind::Float).view(-1)).unwrap()
}

#[test]
fn collectives_do_what_their_names_say_in_both_types() {
    for size in [1usize, 2, 3] {
        ranks(size, |group| {
            for kind in [Kind::Float, Kind::BFloat16] {
                let rank = group.rank() as f64;
                let mine =
                    || Tensor::arange(size as i64 * 2, (Kind::Float, Device::Cpu)).to_kind(kind) + rank;
                let n = size as f32;
                let ranks_sum = (0..size).sum::<usize>() as f32;
                let sums: Vec<f32> = (0..2 * size).map(|i| i as f32 * n + ranks_sum).collect();

                let tensor = mine();
                group.all_reduce(&tensor, ReduceOp::Sum).unwrap().wait().unwrap();
                assert_eq!(values(&tensor), sums);

                let part = Tensor::zeros([2], (kind, Device::Cpu));
                group.reduce_scatter(&part, &mine()).unwrap().wait().unwrap();
                assert_eq!(values(&part), sums[group.rank() * 2..][..2]);

                let whole = Tensor::zeros([2 * size as i64], (kind, Device::Cpu));
                group.all_gather(&whole, &part).unwrap().wait().unwrap();
                assert_eq!(values(&whole), sums);

                let tensor = mine();
                group.broadcast(&tensor, size - 1).unwrap().wait().unwrap();
                assert_eq!(values(&tensor)[..1], [n - 1.0]);
                let tensor = mine();
                group.all_reduce(&tensor, ReduceOp::Max).unwrap().wait().unwrap();
                assert_eq!(values(&tensor)[..1], [n - 1.0]);
                group.barrier().unwrap();
            }
            group.shut_down().unwrap();
            group.shut_down().unwrap();
        });
    }
}

#[test]
fn several_collectives_under_way_end_in_any_order() {
    ranks(2, |group| {
        let tensors: Vec<Tensor> = (0..8).map(|i| Tensor::from_slice(&[i as f32; 1000])).collect();
        let mut works: Vec<Work> =
            tensors.iter().map(|tensor| group.all_reduce(tensor, ReduceOp::Sum).unwrap()).collect();
        while let Some(work) = works.pop() {
            work.wait().unwrap();
        }
        for (i, tensor) in tensors.iter().enumerate() {
            assert_eq!(values(tensor)[999..], [2.0 * i as f32]);
        }
        assert_eq!(group.sent_bytes(), 8 * 4000);
    });
}

#[test]
fn arguments_are_checked_before_the_call() {
    ranks(2, |group| {
        let message = |result: Result<Work>| result.unwrap_err().to_string();
        let row = Tensor::zeros([4, 4], (Kind::Float, Device::Cpu));
        assert!(message(group.all_reduce(&row.transpose(0, 1), ReduceOp::Sum)).contains("contiguous"));
        assert!(message(group.broadcast(&row, 2)).contains("root 2 of a group of 2"));
        assert!(message(group.all_gather(&row, &row)).contains("2 parts of 16 do not make a whole of 16"));
        let half = row.narrow(0, 0, 2).to_kind(Kind::Half);
        assert!(message(group.reduce_scatter(&half, &row)).contains("the part is Half, the whole Float"));
        assert!(
            message(group.all_reduce(&row.to_kind(Kind::Bool), ReduceOp::Sum)).contains("cannot move Bool")
        );
    });
    let server = Store::serve(0, Duration::from_secs(1)).unwrap();
    let options = GroupOptions {
        name: "test".into(),
        backend: Backend::Gloo,
        rank: 2,
        size: 2,
        timeout: Duration::from_secs(1),
        address: None,
    };
    assert!(matches!(ProcessGroup::join(&server, options), Err(Error::Argument { .. })));
}

#[test]
fn a_rank_that_does_not_come_is_a_timeout() {
    let server = Store::serve(0, Duration::from_millis(500)).unwrap();
    let address = Some("127.0.0.1".to_owned());
    let timeout = Duration::from_millis(500);
    let options =
        GroupOptions { name: "test".into(), backend: Backend::Gloo, rank: 0, size: 2, timeout, address };
    let error = ProcessGroup::join(&server, options).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
}

#[test]
fn a_rank_that_does_not_take_part_is_a_timeout() {
    ranks(2, |group| {
        if group.rank() == 1 {
            std::thread::sleep(Duration::from_secs(2));
            return;
        }
        group.set_timeout(Duration::from_millis(500)).unwrap();
        let tensor = Tensor::zeros([4], (Kind::Float, Device::Cpu));
        let error = group.all_reduce(&tensor, ReduceOp::Sum).unwrap().wait().unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    });
}

#[test]
fn the_time_waited_counts_from_its_beginning_and_once() {
    ranks(2, |group| {
        assert_eq!(group.waited(), Duration::ZERO);
        let tensors = [0, 1].map(|_| Tensor::zeros([4], (Kind::Float, Device::Cpu)));
        if group.rank() == 1 {
            std::thread::sleep(Duration::from_millis(600));
            for tensor in &tensors {
                group.all_reduce(tensor, ReduceOp::Sum).unwrap().wait().unwrap();
            }
            return;
        }
        let started = Instant::now();
        let works = tensors.map(|tensor| group.all_reduce(&tensor, ReduceOp::Sum).unwrap());
        let during = std::thread::scope(|scope| {
            for work in works {
                scope.spawn(|| work.wait().unwrap());
            }
            std::thread::sleep(Duration::from_millis(300));
            group.waited().as_secs_f64()
        });
        let (after, took) = (group.waited(), started.elapsed());
        assert!((0.1..0.5).contains(&during), "{during} s in the middle of 0.6 s");
        assert!(Duration::from_millis(300) < after && after <= took, "{after:?} of {took:?}, on two threads");
        assert_eq!(group.waited(), after);
    });
}

#[test]
fn a_simulated_link_carries_one_collective_after_the_other() {
    ranks(2, |group| {
        let group = group.with_simulated_link(1e6);
        let tensors = [0; 3].map(|_| Tensor::zeros([25_000], (Kind::Float, Device::Cpu)));
        let started = Instant::now();
        let works = tensors.map(|tensor| group.all_reduce(&tensor, ReduceOp::Sum).unwrap());
        for work in works {
            work.wait().unwrap();
        }
        let took = started.elapsed().as_secs_f64();
        assert!((0.29..0.6).contains(&took), "3 x 100 kB at 1 MB/s took {took} s");
    });
}

#[test]
fn nccl_without_a_gpu_is_an_error() {
    if tch::Cuda::is_available() {
        return;
    }
    let server = Store::serve(0, Duration::from_secs(1)).unwrap();
    let timeout = Duration::from_secs(1);
    let options = GroupOptions {
        name: "test".into(),
        backend: Backend::Nccl(0),
        rank: 0,
        size: 1,
        timeout,
        address: None,
    };
    let error = ProcessGroup::join(&server, options).unwrap_err();
    assert!(matches!(error, Error::Torch { .. }), "{error:?}");
}
