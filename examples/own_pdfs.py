"""Your own PDFs: a folder with a queries.csv (text, source, page_number) in, a better model out.

python examples/own_pdfs.py pdfs/ Qwen/Qwen3-VL-Embedding-2B my-model
"""

import sys

from mmtune import RetrievalDataset, finetune

if __name__ == "__main__":
    dataset = RetrievalDataset.from_pdfs(sys.argv[1])
    print(dataset.audit())
    train, evaluation = dataset.split(len(dataset) // 5)
    result = finetune(sys.argv[2], train, evaluation, output_dir=sys.argv[3])
    print(result)
