// cblas.h: the few functions of the CBLAS interface that this project calls, for a build without a BLAS
// (`make BLAS=none`, found first on the include path there). Meanings and argument order are those of the reference
// CBLAS of netlib.org; only the cases that are used exist, others end the program with a message.
#pragma once

enum CBLAS_ORDER { CblasRowMajor = 101, CblasColMajor = 102 };
enum CBLAS_TRANSPOSE { CblasNoTrans = 111, CblasTrans = 112 };

// C = alpha op(A) op(B) + beta C.
void cblas_sgemm(CBLAS_ORDER order, CBLAS_TRANSPOSE transpose_a, CBLAS_TRANSPOSE transpose_b, int m, int n, int k,
                 float alpha, const float* a, int lda, const float* b, int ldb, float beta, float* c, int ldc);

// y = alpha op(A) x + beta y, row-major.
void cblas_sgemv(CBLAS_ORDER order, CBLAS_TRANSPOSE transpose, int m, int n, float alpha, const float* a, int lda,
                 const float* x, int incx, float beta, float* y, int incy);
